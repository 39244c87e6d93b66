//! What a kernel can refuse.

/// Input that a kernel cannot compute on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// A token id names no row of the table.
    #[error("token id {id} at position {position} is outside the vocabulary of {vocabulary}")]
    IdOutOfRange {
        /// The id.
        id: u32,
        /// Where it stands.
        position: usize,
        /// Rows of the table.
        vocabulary: usize,
    },
}
