//! `forebay trace`: why the device stood idle, from a picture of a run.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;
use serde_json::json;

/// Say why the device stood idle in the steady steps of a run that `train --trace FILE` wrote
#[derive(clap::Args, Debug)]
pub(crate) struct Trace {
    /// What `train --trace` or `forebay bench step --trace` wrote
    file: PathBuf,
    /// The first step to look at [default: the third]
    #[arg(long)]
    from: Option<u64>,
    /// The last step to look at [default: the last but one, as a step ends where the next begins]
    #[arg(long)]
    to: Option<u64>,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

/// Steps before those that count, if not told.
const WARM_UP: u64 = 2;
/// The longest waits are named, so many.
const NAMED: usize = 5;

#[derive(Deserialize)]
struct File {
    #[serde(rename = "traceEvents")]
    events: Vec<Event>,
}

#[derive(Deserialize)]
struct Event {
    name: String,
    ph: String,
    #[serde(default)]
    tid: u64,
    /// Microseconds, as `dur`.
    #[serde(default)]
    ts: f64,
    #[serde(default)]
    dur: f64,
    #[serde(default)]
    args: Args,
}

#[derive(Default, Deserialize)]
struct Args {
    name: Option<String>,
    step: Option<u64>,
}

/// What a lane is for. The first of those that the idle time is told by is the device's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lane {
    Compute,
    /// One of [`CAUSES`], by its place.
    Cause(usize),
    Worker,
    Trainer,
}

/// What may have been under way while the device stood idle.
const CAUSES: [&str; 5] = [
    "optimizer (CPU)",
    "to the device",
    "from the device",
    "disk read",
    "disk write",
];
/// The same in JSON.
const KEYS: [&str; 5] = [
    "optimizer",
    "to_device",
    "from_device",
    "disk_read",
    "disk_write",
];
const COMPUTE: usize = CAUSES.len();
const TRAINER: usize = COMPUTE + 1;
/// Sets of what may be under way at once.
const SETS: usize = 1 << (TRAINER + 1);

impl Lane {
    fn of(name: &str) -> Option<Self> {
        let numbered = |cause: &str| {
            let rest = name.strip_prefix(cause);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(' '))
        };
        match name {
            "compute" => Some(Self::Compute),
            "trainer waits" => Some(Self::Trainer),
            _ if numbered("optimizer worker") => Some(Self::Worker),
            _ => CAUSES
                .iter()
                .position(|cause| numbered(cause))
                .map(Self::Cause),
        }
    }
}

/// Seconds, all steps together.
#[derive(Debug)]
struct Found {
    first: u64,
    last: u64,
    wall: f64,
    /// By what was under way at once: a bit for each of [`CAUSES`], for compute, and for the trainer's waits.
    at_once: [f64; SETS],
    workers: usize,
    worked: f64,
    /// What the trainer waited for, and how long, longest first.
    waits: Vec<(String, f64)>,
}

impl Found {
    fn steps(&self) -> f64 {
        (self.last - self.first + 1) as f64
    }

    /// Time in which all of `these` were under way, and none of `not`.
    fn time(&self, these: usize, not: usize) -> f64 {
        let all = self.at_once.iter().enumerate();
        let of = all.filter(|(mask, _)| mask & these == these && mask & not == 0);
        of.map(|(_, time)| time).sum()
    }

    fn busy(&self) -> f64 {
        self.time(1 << COMPUTE, 0)
    }

    fn idle(&self) -> f64 {
        self.time(0, 1 << COMPUTE)
    }

    /// Of the idle time, in which a cause was under way, and in which it alone was.
    fn cause(&self, cause: usize) -> [f64; 2] {
        let all = (1 << (COMPUTE + 1)) - 1;
        let this = 1 << cause;
        [1 << COMPUTE, all & !this].map(|not| self.time(this, not))
    }

    /// Of the idle time, in which nothing was; and in which the trainer waited meanwhile.
    fn nothing(&self) -> [f64; 2] {
        let all = (1 << (COMPUTE + 1)) - 1;
        [0, 1 << TRAINER].map(|these| self.time(these, all))
    }

    /// The part of the optimizer's time that its workers had work.
    fn work(&self) -> Option<f64> {
        let all = self.time(1, 0) * self.workers as f64;
        (all > 0.0).then(|| self.worked / all)
    }
}

impl Trace {
    pub(crate) fn run(&self) -> Result<(), String> {
        let name = self.file.display();
        let found = self.read().map_err(|why| format!("{name}: {why}"))?;
        if self.json {
            println!("{}", object(&found));
        } else {
            table(&found);
        }
        Ok(())
    }

    fn read(&self) -> Result<Found, String> {
        let text = std::fs::read(&self.file).map_err(|error| error.to_string())?;
        let file: File = serde_json::from_slice(&text).map_err(|error| {
            let what = match error.is_eof() {
                true => "it breaks off; was the run killed?",
                false => "not what train --trace writes",
            };
            format!("{what} ({error})")
        })?;
        self.find(&file.events)
    }

    fn find(&self, events: &[Event]) -> Result<Found, String> {
        let named = events.iter().filter(|event| event.name == "thread_name");
        let lanes: BTreeMap<u64, Lane> = named
            .filter_map(|event| Some((event.tid, Lane::of(event.args.name.as_deref()?)?)))
            .collect();
        let spans = || {
            let spans = events.iter().filter(|event| event.ph == "X");
            spans.filter_map(|event| Some((*lanes.get(&event.tid)?, event)))
        };
        let mut begins = BTreeMap::<u64, f64>::new();
        for (_, event) in spans().filter(|(lane, _)| *lane == Lane::Compute) {
            let Some(step) = event.args.step else {
                continue;
            };
            let begin = begins.entry(step).or_insert(event.ts);
            *begin = begin.min(event.ts);
        }
        let (first, last) = self.steps(&begins)?;
        let (begin, end) = (begins[&first], begins[&(last + 1)]);
        if begin >= end {
            return Err(format!(
                "step {last} ends before step {first} begins: it is damaged"
            ));
        }
        let inside = |event: &Event| {
            let (from, to) = (event.ts.max(begin), (event.ts + event.dur).min(end));
            (from < to).then_some((from, to))
        };
        let workers = lanes.values().filter(|lane| **lane == Lane::Worker).count();
        let mut found = Found {
            first,
            last,
            wall: (end - begin) / 1e6,
            at_once: [0.0; SETS],
            workers,
            worked: 0.0,
            waits: Vec::new(),
        };
        let (mut edges, mut waits) = (Vec::new(), BTreeMap::<&str, f64>::new());
        for (lane, event) in spans() {
            let Some((from, to)) = inside(event) else {
                continue;
            };
            let which = match lane {
                Lane::Compute => COMPUTE,
                Lane::Cause(cause) => cause,
                Lane::Worker => {
                    found.worked += (to - from) / 1e6;
                    continue;
                }
                Lane::Trainer => {
                    *waits.entry(event.name.as_str()).or_default() += (to - from) / 1e6;
                    TRAINER
                }
            };
            edges.extend([(from, which, 1), (to, which, -1)]);
        }
        found.at_once = at_once(begin, end, edges);
        found.waits = waits
            .into_iter()
            .map(|(what, s)| (what.to_owned(), s))
            .collect();
        found.waits.sort_by(|a, b| b.1.total_cmp(&a.1));
        Ok(found)
    }

    /// The first and the last step to look at.
    fn steps(&self, begins: &BTreeMap<u64, f64>) -> Result<(u64, u64), String> {
        let ends = begins.first_key_value().zip(begins.last_key_value());
        let Some(((least, _), (most, _))) = ends else {
            return Err("no steps in it; give what train --trace FILE wrote".to_owned());
        };
        let first = self.from.unwrap_or(least.saturating_add(WARM_UP));
        let last = self.to.unwrap_or(most.saturating_sub(1));
        let there = |step: u64| begins.contains_key(&step);
        if first > last || !there(first) || !last.checked_add(1).is_some_and(there) {
            return Err(format!(
                "steps {least} to {most} are in it, and each ends where the next begins: steps {first} to \
                 {last} cannot be looked at; trace {} steps or more, or give --from and --to",
                WARM_UP + 2
            ));
        }
        Ok((first, last))
    }
}

/// For each set of what was under way at once, the seconds.
fn at_once(begin: f64, end: f64, mut edges: Vec<(f64, usize, i32)>) -> [f64; SETS] {
    edges.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut seconds = [0.0; SETS];
    let mut under_way = [0; TRAINER + 1];
    let mut now = begin;
    for (at, which, change) in edges {
        seconds[mask(&under_way)] += (at - now) / 1e6;
        now = at;
        under_way[which] += change;
    }
    seconds[mask(&under_way)] += (end - now) / 1e6;
    seconds
}

fn mask(under_way: &[i32; TRAINER + 1]) -> usize {
    let bits = under_way.iter().enumerate();
    bits.map(|(which, count)| usize::from(*count > 0) << which)
        .sum()
}

fn table(found: &Found) {
    let steps = found.steps();
    let ms = |seconds: f64| seconds / steps * 1e3;
    let part = |seconds: f64, of: f64| 100.0 * seconds / of.max(1e-12);
    println!(
        "steps {} to {}: {:.3} ms each; compute {:.3} ms busy ({:.1} %), {:.3} ms idle ({:.1} %)",
        found.first,
        found.last,
        ms(found.wall),
        ms(found.busy()),
        part(found.busy(), found.wall),
        ms(found.idle()),
        part(found.idle(), found.wall)
    );
    println!(
        "{:<20} {:>12} {:>18} {:>18} {:>16}",
        "", "ms of a step", "while compute idle", "% of the idle time", "and nothing else"
    );
    for (cause, name) in CAUSES.iter().enumerate() {
        let [any, alone] = found.cause(cause);
        println!(
            "{name:<20} {:>12.3} {:>18.3} {:>18.1} {:>16.1}",
            ms(found.time(1 << cause, 0)),
            ms(any),
            part(any, found.idle()),
            part(alone, found.idle())
        );
    }
    let [nothing, waiting] = found.nothing();
    for (what, seconds) in [
        ("none of these", nothing),
        ("  the trainer waits", waiting),
        ("  it does not", nothing - waiting),
    ] {
        let of_idle = part(seconds, found.idle());
        println!(
            "{what:<20} {:>12} {:>18.3} {of_idle:>18.1}",
            "",
            ms(seconds)
        );
    }
    if let Some(work) = found.work() {
        println!(
            "the optimizer's {} workers worked {:.1} % of its time",
            found.workers,
            100.0 * work
        );
    }
    let waited: f64 = found.waits.iter().map(|(_, seconds)| seconds).sum();
    println!("the trainer waited {:.3} ms a step; longest:", ms(waited));
    for (what, seconds) in found.waits.iter().take(NAMED) {
        println!("{:>10.3} ms  {what}", ms(*seconds));
    }
}

fn object(found: &Found) -> serde_json::Value {
    let idle = found.idle().max(1e-12);
    let mut causes = serde_json::Map::new();
    for (cause, key) in KEYS.iter().enumerate() {
        let [any, alone] = found.cause(cause);
        let busy = found.time(1 << cause, 0);
        causes.insert(
            (*key).to_owned(),
            json!({"busy_s": busy, "in_idle_s": any, "share": any / idle, "alone": alone / idle}),
        );
    }
    let waits = found.waits.iter().take(NAMED);
    json!({
        "first_step": found.first,
        "last_step": found.last,
        "step_s": found.wall / found.steps(),
        "wall_s": found.wall,
        "compute_busy_s": found.busy(),
        "compute_idle_s": found.idle(),
        "idle": causes,
        "idle_unexplained": found.nothing()[0] / idle,
        "idle_unexplained_waiting": found.nothing()[1] / idle,
        "workers": found.workers,
        "workers_worked": found.work(),
        "waits": waits.map(|(what, seconds)| json!({"what": what, "s": seconds})).collect::<Vec<_>>(),
    })
}
