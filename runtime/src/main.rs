//! The `forebay` command.

mod cli;

use std::process::ExitCode;

use clap::Parser;

/// A heterogeneous memory offload runtime: models larger than the GPU
#[derive(Parser, Debug)]
#[command(name = "forebay", version)]
enum Command {
    #[command(subcommand)]
    Bench(cli::bench::Bench),
    Doctor(cli::doctor::Doctor),
    Inspect(cli::inspect::Inspect),
    Snapshot(cli::snapshot::Snapshot),
}

fn main() -> ExitCode {
    let result = match Command::parse() {
        Command::Bench(bench) => bench.run(),
        Command::Doctor(doctor) => doctor.run(),
        Command::Inspect(inspect) => inspect.run(),
        Command::Snapshot(snapshot) => snapshot.run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
