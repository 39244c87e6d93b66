//! The `forebay` command.

mod cli;

use std::process::ExitCode;

use clap::Parser;

/// A heterogeneous memory offload runtime: models larger than the GPU
#[derive(Parser, Debug)]
#[command(name = "forebay", version)]
enum Command {
    Doctor(cli::doctor::Doctor),
}

fn main() -> ExitCode {
    let Command::Doctor(doctor) = Command::parse();
    match doctor.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
