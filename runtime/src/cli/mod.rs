//! The subcommands of `forebay`, one file each.

pub(crate) mod bench;
pub(crate) mod doctor;
pub(crate) mod inspect;
pub(crate) mod snapshot;
