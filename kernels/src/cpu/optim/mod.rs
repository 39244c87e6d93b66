//! Optimizers on one frame: gradient in, states updated, parameter out, in one pass over memory.
//!
//! An [`Optimizer`] gives the [`Scalars`] of a step; [`update`] applies them to the [`Stored`] states of a run of
//! elements, whatever [`StateFormat`] they are kept in. Each rule is one sequence of correctly rounded operations
//! on every path, so that threads, instruction sets and devices give the same bits. AdamW on f32 states has loops
//! of its own ([`adamw_parallel`](super::adamw_parallel)), which take whole runs from memory and back; everything
//! else passes through a worker's nearest caches, a thousand elements at a time.

mod format;
mod frame;
mod lamb;
mod rules;
mod split;

use super::adam::{self, AdamScalars, AdamW, Exchange, Kept};
use super::isa::Isa;
use super::workers::Workers;
pub use format::{Master, Moment, StateFormat, Stored};
use frame::All;
pub use rules::{Adagrad, Lamb, Lion, Sgd};
use rules::{AdagradScalars, LambScalars, LionScalars, SgdScalars};
use split::Halves;

/// An optimizer and its constants, but for the learning rate, which each step brings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Optimizer {
    /// AdamW (arXiv 1711.05101): two moments.
    AdamW(AdamW),
    /// Stochastic gradient descent, with momentum one moment, and else none.
    Sgd(Sgd),
    /// Lion (arXiv 2302.06675): one moment.
    Lion(Lion),
    /// Adagrad (Duchi, Hazan and Singer, 2011): one sum of squares.
    Adagrad(Adagrad),
    /// LAMB (arXiv 1904.00962): two moments, and the norms of whole tensors.
    Lamb(Lamb),
}

impl From<AdamW> for Optimizer {
    fn from(adam: AdamW) -> Self {
        Self::AdamW(adam)
    }
}

impl std::str::FromStr for Optimizer {
    type Err = String;

    /// By its name, with usual constants and weight decay 0.1.
    fn from_str(name: &str) -> Result<Self, String> {
        let weight_decay = 0.1;
        let (beta1, beta2) = (0.9, 0.95);
        Ok(match name {
            "adamw" => Self::AdamW(AdamW {
                lr: 1e-3,
                beta1,
                beta2,
                eps: 1e-8,
                weight_decay,
            }),
            "sgd" => Self::Sgd(Sgd {
                momentum: 0.9,
                nesterov: false,
                weight_decay,
            }),
            "lion" => Self::Lion(Lion {
                beta1,
                beta2: 0.99,
                weight_decay,
            }),
            "adagrad" => Self::Adagrad(Adagrad {
                lr_decay: 0.0,
                eps: 1e-10,
                weight_decay,
            }),
            "lamb" => Self::Lamb(Lamb {
                beta1,
                beta2,
                eps: 1e-6,
                weight_decay,
            }),
            _ => {
                return Err(format!(
                    "'{name}' is not an optimizer: use adamw, sgd, lion, adagrad or lamb"
                ));
            }
        })
    }
}

impl Optimizer {
    /// Its name, as on the command line.
    pub fn name(&self) -> &'static str {
        match self {
            Self::AdamW(_) => "adamw",
            Self::Sgd(_) => "sgd",
            Self::Lion(_) => "lion",
            Self::Adagrad(_) => "adagrad",
            Self::Lamb(_) => "lamb",
        }
    }

    /// Values that it keeps of each element besides the master.
    pub fn moments(&self) -> u32 {
        match self {
            Self::AdamW(_) | Self::Lamb(_) => 2,
            Self::Sgd(Sgd { momentum, .. }) => u32::from(*momentum != 0.0),
            Self::Lion(_) | Self::Adagrad(_) => 1,
        }
    }

    /// Whether the update of an element depends on its whole tensor.
    pub fn whole_tensors(&self) -> bool {
        matches!(self, Self::Lamb(_))
    }

    /// The same without weight decay.
    #[must_use]
    pub fn without_decay(self) -> Self {
        self.with_decay(0.0)
    }

    /// The same with this weight decay.
    #[must_use]
    pub fn with_decay(self, weight_decay: f64) -> Self {
        match self {
            Self::AdamW(it) => Self::AdamW(AdamW { weight_decay, ..it }),
            Self::Sgd(it) => Self::Sgd(Sgd { weight_decay, ..it }),
            Self::Lion(it) => Self::Lion(Lion { weight_decay, ..it }),
            Self::Adagrad(it) => Self::Adagrad(Adagrad { weight_decay, ..it }),
            Self::Lamb(it) => Self::Lamb(Lamb { weight_decay, ..it }),
        }
    }

    /// The scalars of applied step `step`, counted from 1, with the gradient multiplied by `grad_scale`. Computed in
    /// f64, rounded once.
    pub fn at(&self, step: u64, lr: f64, grad_scale: f64) -> Scalars {
        match self {
            Self::AdamW(it) => Scalars::AdamW(it.at(step, lr, grad_scale)),
            Self::Sgd(it) => Scalars::Sgd(it.at(lr, grad_scale)),
            Self::Lion(it) => Scalars::Lion(it.at(lr, grad_scale)),
            Self::Adagrad(it) => Scalars::Adagrad(it.at(step, lr, grad_scale)),
            Self::Lamb(it) => Scalars::Lamb(it.at(step, lr, grad_scale)),
        }
    }

    /// What is wrong with its constants, or with keeping its states in this format.
    ///
    /// # Errors
    /// One line that says what to do.
    pub fn check(&self, format: StateFormat) -> Result<(), String> {
        let name = self.name();
        if format.moments != self.moments() {
            return Err(format!(
                "{name} keeps {} moments, not {}",
                self.moments(),
                format.moments
            ));
        }
        let slowest = match self {
            Self::AdamW(it) => it.beta1.max(it.beta2),
            Self::Lamb(it) => it.beta1.max(it.beta2),
            Self::Lion(it) => it.beta2,
            Self::Sgd(it) => it.momentum,
            Self::Adagrad(_) => 1.0,
        };
        if format.moment == Moment::Bf16 && slowest > Moment::SLOWEST_IN_BF16 {
            return Err(format!(
                "bf16 moments lose a decay as slow as {slowest} ({name}): keep moments in fp32, or use at most {}",
                Moment::SLOWEST_IN_BF16
            ));
        }
        Ok(())
    }

    /// Bytes of the log of an update of so many elements that may have to be undone; `None` if updates cannot run ahead
    /// of the norm.
    pub fn log_bytes(&self, format: StateFormat, elements: usize) -> Option<usize> {
        match self {
            // Its first pass needs what its second one writes.
            Self::Lamb(_) => None,
            Self::AdamW(_) if format.moment == Moment::F32 => Some(adam::log_bytes(elements)),
            _ => Some(frame::log_bytes(format, elements)),
        }
    }
}

/// What an [`Optimizer`] needs in one step; from [`Optimizer::at`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scalars {
    /// States stay as they are, and the parameter is the master, cast: for a skipped step, or parameters that are
    /// derived anew. The gradient is not looked at.
    Unchanged,
    /// Of AdamW.
    AdamW(AdamScalars),
    /// Of SGD.
    Sgd(SgdScalars),
    /// Of Lion.
    Lion(LionScalars),
    /// Of Adagrad.
    Adagrad(AdagradScalars),
    /// Of LAMB.
    Lamb(LambScalars),
}

impl Scalars {
    /// Whether nothing changes.
    pub fn is_unchanged(&self) -> bool {
        *self == Self::Unchanged
    }

    /// As AdamW's, for its own loops.
    pub(crate) fn adam(&self) -> Option<AdamScalars> {
        match self {
            Self::Unchanged => Some(AdamScalars::unchanged()),
            Self::AdamW(scalars) => Some(*scalars),
            _ => None,
        }
    }

    /// For the device: which rule, and its numbers in the order of their declaration.
    pub(crate) fn words(&self) -> (u32, [f32; 10]) {
        let (rule, numbers): (u32, &[f32]) = match self {
            Self::Unchanged => (0, &[]),
            Self::AdamW(s) => (1, &s.as_array()),
            Self::Sgd(s) => (2, &s.as_array()),
            Self::Lion(s) => (3, &s.as_array()),
            Self::Adagrad(s) => (4, &s.as_array()),
            Self::Lamb(s) => (5, &s.as_array()),
        };
        let mut all = [0.0; 10];
        all[..numbers.len()].copy_from_slice(numbers);
        (rule, all)
    }
}

/// Updates a run of elements on all workers.
///
/// # Panics
/// If lengths differ, this machine cannot run `isa`, or a split master has no bf16 parameter of its own.
pub fn update(
    workers: &Workers,
    isa: Isa,
    scalars: &Scalars,
    stored: Stored<'_>,
    exchange: Exchange<'_>,
) {
    assert!(isa.runs_here(), "this machine cannot run {isa:?}");
    let stored = match (stored.into_plain(), scalars.adam()) {
        (Ok(states), Some(adam)) => {
            return adam::adamw_parallel(workers, isa, &adam, states, exchange);
        }
        (Ok(states), None) => Stored::from(states),
        (Err(stored), _) => stored,
    };
    let all = All::new(stored, exchange);
    match scalars {
        Scalars::Lamb(scalars) => lamb::update(workers, isa, scalars, &all),
        _ => frame::update(workers, isa, scalars, &all),
    }
}

/// As [`update`], so that it can be undone. Elements whose log does not fit are left as they are, for
/// [`update_rest`]; how many that were. `kept.log` is as long as [`Optimizer::log_bytes`] says.
///
/// # Panics
/// As [`update`]; for scalars of an optimizer that cannot run ahead.
pub fn update_ahead(
    workers: &Workers,
    isa: Isa,
    scalars: &Scalars,
    stored: Stored<'_>,
    exchange: Exchange<'_>,
    kept: Kept<'_>,
) -> usize {
    match Logged::of(isa, scalars, stored, exchange) {
        Logged::Plain(adam, states, exchange) => {
            adam::adamw_ahead(workers, isa, &adam, states, exchange, kept)
        }
        Logged::Split(adam, all) => adam::ahead::ahead_of(workers, isa, &adam, &all, kept),
        Logged::Aside(all) => {
            frame::ahead(workers, isa, scalars, &all, kept);
            0
        }
    }
}

/// Updates what [`update_ahead`] left as it was.
///
/// # Panics
/// As [`update_ahead`].
pub fn update_rest(
    workers: &Workers,
    isa: Isa,
    scalars: &Scalars,
    stored: Stored<'_>,
    exchange: Exchange<'_>,
    kept: Kept<'_>,
) {
    match Logged::of(isa, scalars, stored, exchange) {
        Logged::Plain(adam, states, exchange) => {
            adam::adamw_rest(workers, isa, &adam, states, exchange, kept);
        }
        Logged::Split(adam, all) => adam::ahead::rest_of(workers, isa, &adam, &all, kept),
        // It leaves nothing.
        Logged::Aside(_) => {}
    }
}

/// Takes back what [`update_ahead`] did with these scalars to the same memory: states (a split master's parameter among
/// them), and the gradient of an exchange in place. Another parameter that has a place of its own stays as it is.
///
/// # Panics
/// As [`update_ahead`].
pub fn update_undo(
    workers: &Workers,
    isa: Isa,
    scalars: &Scalars,
    stored: Stored<'_>,
    exchange: Exchange<'_>,
    kept: Kept<'_>,
) {
    match Logged::of(isa, scalars, stored, exchange) {
        Logged::Plain(adam, states, exchange) => {
            adam::adamw_undo(workers, isa, &adam, states, exchange, kept);
        }
        Logged::Split(adam, all) => adam::ahead::undo_of(workers, isa, &adam, &all, kept),
        Logged::Aside(all) => frame::undo(workers, &all, kept),
    }
}

/// By what log an update can be undone.
enum Logged<'a> {
    /// AdamW's.
    Plain(AdamScalars, adam::States<'a>, Exchange<'a>),
    /// AdamW's, of a split master.
    Split(AdamScalars, Halves<'a>),
    /// A copy of what is overwritten.
    Aside(All<'a>),
}

impl<'a> Logged<'a> {
    fn of(isa: Isa, scalars: &Scalars, stored: Stored<'a>, exchange: Exchange<'a>) -> Self {
        let Scalars::AdamW(adam) = scalars else {
            return Self::Aside(All::new(stored, exchange));
        };
        let stored = match stored.into_plain() {
            Ok(states) => return Self::Plain(*adam, states, exchange),
            Err(stored) => stored,
        };
        match Halves::new(stored, exchange, isa) {
            Ok(all) => Self::Split(*adam, all),
            Err((stored, exchange)) => Self::Aside(All::new(stored, exchange)),
        }
    }
}
