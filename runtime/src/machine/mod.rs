//! What the machine has.
/// x
pub(crate) fn default_budgets() -> forebay_prefetch::Budgets {
    forebay_prefetch::Budgets {
        device_bytes: 1 << 30,
        pinned_bytes: 1 << 30,
    }
}
