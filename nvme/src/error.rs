//! What can go wrong on the disk tier, with the file, the place and what to do.

use std::io;
use std::path::PathBuf;

/// Why the store refused or failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A folder given for the disk tier cannot be used.
    #[error("disk folder {path}: {source}; give --disk an existing, writable folder")]
    Folder {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There is a store already.
    #[error("{path} already holds a store; go on with --resume, or give another --disk")]
    Exists {
        /// The folder.
        path: PathBuf,
    },
    /// There is nothing to open.
    #[error("{path} holds no published generation; a run without --resume makes one")]
    NoGeneration {
        /// The folder.
        path: PathBuf,
    },
    /// Another process uses the store.
    #[error("{path} is in use by process {owner}; stop it, or give another --disk")]
    Locked {
        /// The folder.
        path: PathBuf,
        /// The process that holds the lock.
        owner: String,
    },
    /// The disk has too little room, found before anything was written.
    #[error(
        "{path} has {free} bytes free and the store needs {needed} more; {instead}free some or give \
         another --disk"
    )]
    Space {
        /// The folder.
        path: PathBuf,
        /// Bytes needed there.
        needed: u64,
        /// Bytes free there.
        free: u64,
        /// What would fit, in words that end with `, or `; or nothing.
        instead: String,
    },
    /// The store belongs to another model.
    #[error(
        "{path} holds '{found}', not '{expected}'; give another --disk, or the model's own configuration"
    )]
    OtherModel {
        /// The folder.
        path: PathBuf,
        /// The model wanted.
        expected: String,
        /// The model found.
        found: String,
    },
    /// What a store says of itself cannot be read: damaged, or not ours.
    #[error("{path}: {what}; restore it from a snapshot, or start anew in another --disk")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// Written in a format that this version cannot read.
    #[error(
        "{path} is in format {version} and this version of Forebay reads format {}; use the version \
         that wrote it, or start anew in another --disk",
        crate::FORMAT
    )]
    Format {
        /// The file.
        path: PathBuf,
        /// Its format.
        version: u32,
    },
    /// The folders given are not those of the store.
    #[error("{path}: {what}")]
    Folders {
        /// The folder.
        path: PathBuf,
        /// Which are missing or too many.
        what: String,
    },
    /// Data on disk is not what was written.
    #[error(
        "{what}: the checksum of {path} at byte {offset} does not match what generation \
         {generation} wrote; the data is damaged and was not used"
    )]
    Checksum {
        /// The state and section.
        what: String,
        /// The file.
        path: PathBuf,
        /// Where the extent starts.
        offset: u64,
        /// The generation that wrote it.
        generation: u64,
    },
    /// The system failed a read, write or sync.
    #[error("{operation} {what} at byte {offset} of {path}: {source}")]
    Io {
        /// `reading`, `writing` or `syncing`.
        operation: &'static str,
        /// The state and section.
        what: String,
        /// The file.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// Why.
        source: io::Error,
    },
    /// The disk has not answered for too long.
    #[error(
        "{why} ({requests} requests under way, one of them for {what}); \
         what it may still touch stays locked until the process ends: look at the disk, then resume \
         from the last generation"
    )]
    Stalled {
        /// That the disk has not answered, and for how long; or that its thread has ended.
        why: String,
        /// Requests without an answer.
        requests: usize,
        /// One of them, in words.
        what: String,
    },
    /// A transfer was given up before its end, as it was asked to be.
    #[error("{what} was cancelled")]
    Cancelled {
        /// The state and section.
        what: String,
    },
    /// A state that was never written was asked for.
    #[error("{what} was never written to this store")]
    Missing {
        /// The state and section.
        what: String,
    },
    /// The store was used in a way that it does not allow.
    #[error("store: {0}")]
    Misuse(String),
    /// An earlier failure made what is on disk unsure; nothing more is published.
    #[error("the store failed earlier ({0}); close it and resume from the last generation")]
    Failed(String),
}
