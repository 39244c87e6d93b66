//! What the tests ask for: order, faults, defects.

use std::str::FromStr;

/// A call that fails.
#[derive(Clone, Debug)]
pub(crate) struct Fail {
    pub(crate) function: String,
    pub(crate) nth: u64,
    pub(crate) code: i32,
}

/// See the crate.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) seed: u64,
    pub(crate) fail: Vec<Fail>,
    pub(crate) lose: Option<(u64, i32)>,
    pub(crate) stop: Option<u64>,
    pub(crate) ignore_waits: bool,
    pub(crate) early_events: bool,
    pub(crate) memory: u64,
    /// Compute capability, before the point.
    pub(crate) capability: u64,
}

impl Settings {
    /// From the environment.
    pub(crate) fn environment() -> Self {
        Self::read(|name| std::env::var(format!("FOREBAY_STUB_{name}")).ok())
    }

    /// From `NAME=value;NAME=value`.
    pub(crate) fn parse(text: &str) -> Self {
        let pairs: Vec<(&str, &str)> = text
            .split(';')
            .filter(|pair| !pair.is_empty())
            .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
            .collect();
        Self::read(|name| {
            let value = pairs.iter().find(|(key, _)| *key == name);
            value.map(|(_, value)| (*value).to_owned())
        })
    }

    fn read(get: impl Fn(&str) -> Option<String>) -> Self {
        let flag = |name| get(name).is_some_and(|text| text != "0");
        Self {
            seed: get("SEED").map_or(0, |text| number(&text)),
            fail: get("FAIL").map_or_else(Vec::new, |text| text.split(',').map(fail).collect()),
            lose: get("LOSE").map(|text| {
                let (nth, code) = text.split_once(':').unwrap_or((&text, "700"));
                (number(nth), number(code))
            }),
            stop: get("STOP").map(|text| number(&text)),
            ignore_waits: flag("IGNORE_WAITS"),
            early_events: flag("EARLY_EVENTS"),
            memory: get("MEMORY").map_or(256 << 20, |text| number(&text)),
            capability: get("CAPABILITY").map_or(9, |text| number(&text)),
        }
    }
}

fn fail(text: &str) -> Fail {
    let mut parts = text.split(':');
    let mut next = || parts.next().unwrap_or_default();
    Fail {
        function: next().to_owned(),
        nth: number(next()),
        code: number(next()),
    }
}

/// A setting that cannot be read must not pass for none.
fn number<T: FromStr>(text: &str) -> T {
    let Ok(number) = text.trim().parse() else {
        panic!("the CUDA stub cannot read '{text}' as a number");
    };
    number
}

/// Random numbers: splitmix64.
#[derive(Debug)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    /// Below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x ^ (x >> 31)) % end.max(1)
    }
}
