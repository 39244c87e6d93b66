//! `forebay snapshot`: keeps a generation.

use std::path::PathBuf;

use forebay::Bytes;
use forebay::nvme::{Folders, snapshot};

/// Keep the published generation of a store in other folders: a store of its own, to resume from
#[derive(clap::Args, Debug)]
pub(crate) struct Snapshot {
    /// The folders of the store (nobody may be using it meanwhile)
    #[arg(required = true)]
    paths: Vec<PathBuf>,
    /// An empty folder for each; made if it is not there
    #[arg(long, required = true, num_args = 1..)]
    to: Vec<PathBuf>,
}

impl Snapshot {
    pub(crate) fn run(&self) -> Result<(), String> {
        for folder in &self.to {
            std::fs::create_dir_all(folder)
                .map_err(|error| format!("making {}: {error}", folder.display()))?;
        }
        let kept = snapshot(&self.paths, &self.to, &Folders).map_err(|error| error.to_string())?;
        let how = if kept.shared {
            "shared with the store by the file system until either changes"
        } else {
            "copied and verified"
        };
        println!(
            "generation {}: {} of states, {how}",
            kept.generation,
            Bytes(kept.bytes)
        );
        Ok(())
    }
}
