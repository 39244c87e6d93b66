//! `forebay doctor`: the machine as a new user needs it.

use std::path::PathBuf;

use forebay::machine::{Fact, Standing, examine};
use serde_json::json;

/// Look at the machine: what is there, what is amiss, and the line that mends it
#[derive(clap::Args, Debug)]
pub(crate) struct Doctor {
    /// A folder for the disk tier to try; give it again for each further disk
    #[arg(long, default_value = ".")]
    disk: Vec<PathBuf>,
    /// One JSON array
    #[arg(long)]
    json: bool,
}

impl Doctor {
    /// Prints the facts; an error names the first that would stop a run.
    pub(crate) fn run(&self) -> Result<(), String> {
        let facts = examine(&self.disk);
        if self.json {
            let facts: Vec<_> = facts.iter().map(object).collect();
            println!("{}", json!(facts));
        } else {
            facts.iter().for_each(line);
        }
        match facts.iter().find(|f| f.standing == Standing::Bad) {
            None => Ok(()),
            Some(fact) => Err(format!("{}: {}", fact.name, fact.value)),
        }
    }
}

fn word(standing: Standing) -> &'static str {
    match standing {
        Standing::Good => "ok",
        Standing::Poor => "note",
        Standing::Bad => "FAIL",
    }
}

fn line(fact: &Fact) {
    println!(
        "{:<5} {:<18} {}",
        word(fact.standing),
        fact.name,
        fact.value
    );
    if let Some(mend) = &fact.mend {
        println!("{:<5} {:<18} -> {mend}", "", "");
    }
}

fn object(fact: &Fact) -> serde_json::Value {
    json!({
        "name": fact.name,
        "value": fact.value,
        "standing": word(fact.standing),
        "mend": fact.mend,
    })
}
