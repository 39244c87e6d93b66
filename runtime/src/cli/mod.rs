//! The subcommands of `forebay`, one file each.

pub(crate) mod doctor;
