//! Loss scaling (Micikevicius et al., arXiv 1710.03740, section 3.2): gradients in f16 are those of the loss times
//! a power of two, so that small ones are not lost; norms and updates divide by it again, exactly.
//!
//! The scale of a step follows from the norms of all steps before it and from nothing else, so that results do not
//! depend on timing. What follows from them is kept in generations.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::tensor::DType;

/// By what a step multiplies the gradient of its loss ([`Step::loss_scale`](crate::Step::loss_scale)). Scales are
/// powers of two from 2^-64 to 2^64.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum LossScale {
    /// [`LossScale::Dynamic`] with its defaults for a model that computes in f16, else none.
    #[default]
    Auto,
    /// Not at all.
    None,
    /// Always by this. A step whose gradient is not finite is skipped, as ever.
    Fixed(f64),
    /// By as much as the gradients bear.
    Dynamic(DynamicScale),
}

/// A scale that is lowered when a gradient is not finite (the step is skipped, on every tier), and raised after so
/// many steps that were.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DynamicScale {
    /// That of the first step.
    pub initial: f64,
    /// Steps in a row with finite gradients after which it is raised.
    pub growth_interval: u64,
    /// By what it is multiplied then: 2 or more.
    pub growth: f64,
    /// By what it is multiplied after a gradient that was not finite: 1/2 or less.
    pub backoff: f64,
    /// It does not go below this.
    pub least: f64,
}

impl Default for DynamicScale {
    /// From 65536 on, doubled after 2000 steps, halved down to 1.
    fn default() -> Self {
        Self {
            initial: 65536.0,
            growth_interval: 2000,
            growth: 2.0,
            backoff: 0.5,
            least: 1.0,
        }
    }
}

impl fmt::Display for LossScale {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::None => f.write_str("none"),
            Self::Fixed(scale) => write!(f, "{scale}"),
            Self::Dynamic(_) => f.write_str("dynamic"),
        }
    }
}

impl std::str::FromStr for LossScale {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "none" => Ok(Self::None),
            "dynamic" => Ok(Self::Dynamic(DynamicScale::default())),
            _ => {
                let scale = text.parse().map_err(|_| {
                    format!("'{text}': use none, dynamic or a power of two, as 1024")
                })?;
                power(scale)?;
                Ok(Self::Fixed(scale))
            }
        }
    }
}

/// The most that a scale is, as a power of two; and one over it the least.
const MOST: i32 = 64;

/// The power of two that a scale is.
fn power(scale: f64) -> std::result::Result<i32, String> {
    let near = scale.log2().floor();
    let range = -f64::from(MOST)..=f64::from(MOST);
    if range.contains(&near) && value(near as i32) == scale {
        return Ok(near as i32);
    }
    let hint = match range.contains(&near) {
        true => format!("{} or {}", value(near as i32), value(near as i32 + 1)),
        false => "as 1024".to_owned(),
    };
    Err(format!(
        "a loss scale of {scale} cannot be undone exactly: use a power of two from 2^-{MOST} to 2^{MOST}, {hint}"
    ))
}

fn value(power: i32) -> f64 {
    2f64.powi(power)
}

/// What decides the next scale, all of it, as generations keep it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ScaleState {
    /// The scale is two to the power of this.
    power: i32,
    /// Steps with finite gradients since it last changed.
    good: u64,
}

#[derive(Clone, Copy, Debug)]
enum Rule {
    Off,
    Fixed,
    /// Powers of two.
    Dynamic {
        interval: u64,
        growth: i32,
        backoff: i32,
        least: i32,
    },
}

/// The scale, from step to step.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scaler {
    rule: Rule,
    state: ScaleState,
}

impl Scaler {
    pub(super) fn new(choice: LossScale, dtype: DType) -> Result<Self> {
        Self::checked(choice, dtype).map_err(Error::Misuse)
    }

    fn checked(choice: LossScale, dtype: DType) -> std::result::Result<Self, String> {
        let at = |rule, power| Self {
            rule,
            state: ScaleState { power, good: 0 },
        };
        let dynamic = match choice {
            LossScale::Fixed(scale) => return Ok(at(Rule::Fixed, power(scale)?)),
            LossScale::Auto if dtype == DType::F16 => DynamicScale::default(),
            LossScale::Auto | LossScale::None => return Ok(at(Rule::Off, 0)),
            LossScale::Dynamic(dynamic) => dynamic,
        };
        let [initial, least] = [power(dynamic.initial)?, power(dynamic.least)?];
        let [growth, backoff] = [power(dynamic.growth)?, power(dynamic.backoff)?];
        if growth < 1 || backoff > -1 || initial < least || dynamic.growth_interval == 0 {
            return Err(format!(
                "a dynamic loss scale grows (by 2 or more, after 1 step or more), backs off (by 1/2 or less) and \
                 begins at its least or above, not as {dynamic:?}"
            ));
        }
        let rule = Rule::Dynamic {
            interval: dynamic.growth_interval,
            growth,
            backoff,
            least,
        };
        Ok(at(rule, initial))
    }

    /// Whether steps have to multiply by it.
    pub(super) fn on(&self) -> bool {
        !matches!(self.rule, Rule::Off)
    }

    /// Whether it depends on the norms of the steps before.
    pub(super) fn follows_norms(&self) -> bool {
        matches!(self.rule, Rule::Dynamic { .. })
    }

    /// That of the step after those whose norms were seen.
    pub(super) fn scale(&self) -> f64 {
        value(self.state.power)
    }

    /// The norm of a step that was to be applied.
    pub(super) fn saw(&mut self, finite: bool) {
        let Rule::Dynamic {
            interval,
            growth,
            backoff,
            least,
        } = self.rule
        else {
            return;
        };
        let ScaleState { power, good } = &mut self.state;
        *good = if finite { *good + 1 } else { 0 };
        if !finite {
            *power = (*power + backoff).max(least);
        } else if *good >= interval {
            (*power, *good) = ((*power + growth).min(MOST), 0);
        }
    }

    /// What a generation is to keep.
    pub(super) fn state(&self) -> Option<ScaleState> {
        self.follows_norms().then_some(self.state)
    }

    /// Goes on from what a generation kept, if it kept any.
    pub(super) fn restore(&mut self, stored: Option<ScaleState>) {
        if let (Some(stored), Rule::Dynamic { least, .. }) = (stored, self.rule) {
            let power = stored.power.clamp(least, MOST);
            self.state = ScaleState { power, ..stored };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scaler(dynamic: DynamicScale) -> Scaler {
        Scaler::new(LossScale::Dynamic(dynamic), DType::F32).unwrap()
    }

    #[test]
    fn the_scale_halves_at_once_doubles_after_the_interval_and_stays_in_its_range() {
        let mut scaler = scaler(DynamicScale {
            initial: 8.0,
            growth_interval: 3,
            least: 2.0,
            ..DynamicScale::default()
        });
        let mut seen = |finite: bool| {
            scaler.saw(finite);
            scaler.scale()
        };
        let steps = [
            false, false, false, true, true, true, true, true, false, true, true, true,
        ];
        let scales = steps.map(&mut seen);
        let wanted = [4.0, 2.0, 2.0, 2.0, 2.0, 4.0, 4.0, 4.0, 2.0, 2.0, 2.0, 4.0];
        assert_eq!(scales, wanted);
        // However long nothing overflows.
        let last = (0..1000).map(|_| seen(true)).last();
        assert_eq!(last, Some(2f64.powi(64)));
    }

    #[test]
    fn a_scale_that_is_no_power_of_two_is_refused_with_those_beside_it() {
        for (text, words) in [
            ("1000", "512 or 1024"),
            ("-2", "as 1024"),
            ("1e30", "as 1024"),
            ("inf", "as 1024"),
            ("0", "as 1024"),
            ("often", "none, dynamic or"),
        ] {
            let error = text.parse::<LossScale>().unwrap_err();
            assert!(error.contains(words), "{text}: {error}");
        }
        assert_eq!("0.25".parse(), Ok(LossScale::Fixed(0.25)));
        let dynamic = DynamicScale {
            backoff: 1.0,
            ..DynamicScale::default()
        };
        assert!(Scaler::new(LossScale::Dynamic(dynamic), DType::F16).is_err());
        for dtype in [DType::F32, DType::Bf16, DType::F16] {
            let auto = Scaler::new(LossScale::Auto, dtype).unwrap();
            assert_eq!(auto.follows_norms(), dtype == DType::F16);
            assert_eq!(auto.scale() == 65536.0, dtype == DType::F16);
        }
    }

    #[test]
    fn what_a_generation_keeps_is_all_that_decides_and_bad_powers_are_brought_into_range() {
        let dynamic = DynamicScale {
            growth_interval: 4,
            ..DynamicScale::default()
        };
        let mut first = scaler(dynamic);
        for finite in [true, false, true, true, true] {
            first.saw(finite);
        }
        let text = serde_json::to_string(&first.state()).unwrap();
        let mut second = scaler(dynamic);
        second.restore(serde_json::from_str(&text).unwrap());
        for finite in [true, true, false, true] {
            first.saw(finite);
            second.saw(finite);
            assert_eq!(first.state(), second.state());
        }
        // Without the count it would not go on alike.
        assert_ne!(scaler(dynamic).state(), second.state());
        second.restore(serde_json::from_str(r#"{"power":4000,"good":0}"#).unwrap());
        assert_eq!(second.scale(), 2f64.powi(64));
    }
}
