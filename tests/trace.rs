//! What `train --trace` writes: lanes that do one thing at a time, workers inside their optimizer, waits with
//! names, arrows with two ends.
#![allow(clippy::unwrap_used)]

mod cli;

use std::collections::{BTreeMap, BTreeSet};

use cli::Place;
use serde_json::Value;

/// How far times may be off that are written in thousandths of a microsecond.
const ROUNDED: f64 = 0.01;

struct Span {
    name: String,
    step: u64,
    start: f64,
    end: f64,
}

/// The spans of each lane, by its name, in order of time; and the arrows: lane and time of each end.
struct Picture {
    lanes: BTreeMap<String, Vec<Span>>,
    arrows: Vec<[(String, f64); 2]>,
}

fn number(event: &Value, key: &str) -> Result<f64, String> {
    event[key].as_f64().ok_or(format!("no {key} in {event}"))
}

impl Picture {
    fn of(events: &[Value]) -> Result<Self, String> {
        let named = events.iter().filter(|e| e["name"] == "thread_name");
        let names: BTreeMap<u64, String> = named
            .map(|e| {
                (
                    e["tid"].as_u64().unwrap(),
                    e["args"]["name"].as_str().unwrap().to_owned(),
                )
            })
            .collect();
        let lane = |e: &Value| {
            let name = e["tid"].as_u64().and_then(|tid| names.get(&tid));
            name.cloned().ok_or(format!("a lane without a name: {e}"))
        };
        let mut lanes: BTreeMap<String, Vec<Span>> = names
            .values()
            .map(|name| (name.clone(), Vec::new()))
            .collect();
        let mut ends = BTreeMap::<u64, [Vec<(String, f64)>; 2]>::new();
        for event in events {
            let at = || number(event, "ts");
            match event["ph"].as_str() {
                Some("X") => lanes.get_mut(&lane(event)?).unwrap().push(Span {
                    name: event["name"].as_str().unwrap().to_owned(),
                    step: event["args"]["step"].as_u64().unwrap(),
                    start: at()?,
                    end: at()? + number(event, "dur")?,
                }),
                Some(end @ ("s" | "f")) => {
                    let ends = ends.entry(event["id"].as_u64().unwrap()).or_default();
                    ends[usize::from(end == "f")].push((lane(event)?, at()?));
                }
                _ => {}
            }
        }
        for spans in lanes.values_mut() {
            spans.sort_by(|a, b| a.start.total_cmp(&b.start));
        }
        let both = |(id, ends): (u64, [Vec<(String, f64)>; 2])| match ends.map(<[_; 1]>::try_from) {
            [Ok([from]), Ok([to])] => Ok([from, to]),
            other => Err(format!("arrow {id} has not two ends: {other:?}")),
        };
        let arrows = ends.into_iter().map(both).collect::<Result<_, _>>()?;
        Ok(Self { lanes, arrows })
    }

    fn like<'p>(&'p self, name: &'p str) -> impl Iterator<Item = (&'p str, &'p [Span])> {
        let like = self
            .lanes
            .iter()
            .filter(move |(lane, _)| lane.starts_with(name));
        like.map(|(lane, spans)| (lane.as_str(), spans.as_slice()))
    }

    fn check(&self) -> Result<(), String> {
        for (lane, spans) in &self.lanes {
            if let Some(pair) = spans.windows(2).find(|p| p[0].end > p[1].start + ROUNDED) {
                return Err(format!(
                    "{lane}: {} runs into {}",
                    pair[0].name, pair[1].name
                ));
            }
        }
        let optimizer = &self.lanes["optimizer (CPU)"];
        for (lane, spans) in self.like("optimizer worker") {
            for span in spans {
                let around = optimizer.iter().any(|o| {
                    let within = o.start <= span.start + ROUNDED && span.end <= o.end + ROUNDED;
                    within && o.step == span.step && o.name.contains(&span.name)
                });
                if !around {
                    return Err(format!("{lane}: {} is not the optimizer's", span.name));
                }
            }
        }
        for [from, to] in &self.arrows {
            if from.1 > to.1 + ROUNDED {
                return Err(format!(
                    "an arrow goes back in time, from {from:?} to {to:?}"
                ));
            }
            for (lane, at) in [from, to] {
                let on = |s: &Span| s.start <= at + ROUNDED && *at <= s.end + ROUNDED;
                if !self.lanes[lane].iter().any(on) {
                    return Err(format!("an arrow ends at {at} on nothing of {lane}"));
                }
            }
        }
        Ok(())
    }
}

/// A run's events.
fn traced(flags: &[&str]) -> Vec<Value> {
    let place = Place::new();
    let path = place.path("trace.json");
    let trace = path.display().to_string();
    let output = place.run(&[&["--json", "--trace", &trace], flags].concat());
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let text = std::fs::read_to_string(path).unwrap();
    let mut file: Value = serde_json::from_str(&text).unwrap();
    let Value::Array(events) = file["traceEvents"].take() else {
        panic!("no events");
    };
    events
}

#[test]
fn a_trace_shows_each_stage_once_a_step_and_every_worker_within_its_optimizer() {
    for flags in [
        ["--threads", "3", "--ahead", "never"],
        ["--threads", "1", "--ahead", "always"],
    ] {
        let events = traced(&flags);
        let picture = Picture::of(&events).unwrap();
        picture.check().unwrap();
        let heads = picture.lanes["compute"].iter().filter(|s| s.name == "head");
        assert_eq!(heads.count(), 4, "one a step");
        let workers: Vec<_> = picture
            .like("optimizer worker")
            .map(|(lane, _)| lane)
            .collect();
        assert_eq!(workers.len().to_string(), flags[1]);
        // The first is the thread that calls, and has a part in everything.
        let first = &picture.lanes["optimizer worker 0"];
        assert!(first.len() > 100, "{}", first.len());
        for lane in [
            "compute",
            "to the device",
            "from the device",
            "disk read 0",
            "disk write 0",
        ] {
            assert!(!picture.lanes[lane].is_empty(), "{lane} worked");
        }
        let of = |lane, what: &str| {
            let spans = picture.like(lane).flat_map(|(_, spans)| spans);
            spans.filter(|s| s.name.starts_with(what)).count()
        };
        let (reads, writes) = (of("disk read", "read"), of("disk write", "write"));
        assert_eq!(
            (of("disk", ""), reads > 0, writes > 0),
            (reads + writes, true, true)
        );
    }
}

#[test]
fn a_wait_names_the_stage_and_what_it_waited_for_and_arrows_come_from_there() {
    let picture = Picture::of(&traced(&[])).unwrap();
    picture.check().unwrap();
    let waits = picture.lanes["trainer waits"].iter();
    let (losses, waits): (Vec<_>, Vec<_>) = waits.partition(|s| s.name == "waits for the loss");
    assert_eq!(losses.len(), 4, "one a step");
    let tasks: BTreeSet<&str> = picture
        .lanes
        .iter()
        .filter(|(lane, _)| *lane != "trainer waits")
        .flat_map(|(_, spans)| spans.iter().flat_map(|s| s.name.split(", ")))
        .collect();
    assert!(waits.len() > 10, "{}", waits.len());
    let mut named = 0;
    for wait in &waits {
        let (stage, causes) = wait
            .name
            .split_once(" waits for ")
            .unwrap_or((&wait.name, ""));
        let causes: Vec<_> = causes.split(" <- ").filter(|c| !c.is_empty()).collect();
        let known = causes
            .iter()
            .chain([&stage])
            .all(|task| tasks.contains(task));
        assert!(known && causes.len() <= 3, "{}", wait.name);
        named += usize::from(!causes.is_empty());
    }
    assert!(
        10 * named > 9 * waits.len(),
        "{named} of {} are explained",
        waits.len()
    );
    // An arrow into a wait comes from the end of something that is named in it, or further back.
    let mut told = 0;
    for [(lane, from), to] in &picture.arrows {
        if to.0 != "trainer waits" {
            continue;
        }
        let on = |s: &&Span, at: f64| s.start <= at + ROUNDED && at <= s.end + ROUNDED;
        let wait = waits.iter().find(|s| on(s, to.1)).unwrap();
        let by = picture.lanes[lane].iter().find(|s| on(s, *from)).unwrap();
        assert!(
            by.end <= wait.end + ROUNDED,
            "{} let go before its end",
            by.name
        );
        told += usize::from(by.name.split(", ").any(|name| wait.name.contains(name)));
    }
    assert!(
        2 * told > waits.len(),
        "{told} of {} waits have their arrow",
        waits.len()
    );
    // Where the disk binds, that is what is waited for in the end.
    let picture = Picture::of(&traced(&[
        "--placement",
        "disk",
        "--disk-throttle",
        "100MB",
    ]))
    .unwrap();
    let waits = picture.lanes["trainer waits"].iter();
    let long = waits
        .max_by(|a, b| (a.end - a.start).total_cmp(&(b.end - b.start)))
        .unwrap();
    assert!(
        long.name.contains("read ") || long.name.contains("write "),
        "{}",
        long.name
    );
}

#[test]
fn the_check_notices_lanes_that_overlap_workers_elsewhere_and_arrows_with_one_end() {
    let events = traced(&[]);
    let fails = |what: &str, change: &dyn Fn(&mut Vec<Value>)| {
        let mut events = events.clone();
        change(&mut events);
        let error = Picture::of(&events)
            .and_then(|picture| picture.check())
            .unwrap_err();
        assert!(error.contains(what), "{error}");
    };
    let last =
        |events: &[Value], test: &dyn Fn(&Value) -> bool| events.iter().rposition(test).unwrap();
    fails("runs into", &|events| {
        let at = last(events, &|e| e["ph"] == "X" && e["tid"] == 0);
        let longer = events[at]["ts"].as_f64().unwrap() / 2.0;
        events[at]["ts"] = longer.into();
        events[at]["dur"] = longer.into();
    });
    fails("is not the optimizer's", &|events| {
        let at = last(events, &|e| e["ph"] == "X" && e["tid"] == 1000);
        events[at]["ts"] = 1e12.into();
    });
    fails("has not two ends", &|events| {
        let at = last(events, &|e| e["ph"] == "s");
        events.remove(at);
    });
    fails("on nothing", &|events| {
        let at = last(events, &|e| e["ph"] == "f");
        events[at]["ts"] = 1e12.into();
    });
    fails("back in time", &|events| {
        let at = last(events, &|e| e["ph"] == "f");
        events[at]["ts"] = 0.into();
    });
}
