//! The `forebay` command: its subcommands, one file each.

mod bench;
mod doctor;
mod inspect;
mod snapshot;
mod trace;

use std::process::ExitCode;

use clap::Parser;

/// A heterogeneous memory offload runtime: models larger than the GPU
#[derive(Parser, Debug)]
#[command(name = "forebay", version)]
enum Command {
    #[command(subcommand)]
    Bench(bench::Bench),
    Doctor(doctor::Doctor),
    Inspect(inspect::Inspect),
    Snapshot(snapshot::Snapshot),
    Trace(trace::Trace),
}

fn main() -> ExitCode {
    let result = match Command::parse() {
        Command::Bench(bench) => bench.run(),
        Command::Doctor(doctor) => doctor.run(),
        Command::Inspect(inspect) => inspect.run(),
        Command::Snapshot(snapshot) => snapshot.run(),
        Command::Trace(trace) => trace.run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
