//! AdamW (Loshchilov and Hutter, arXiv 1711.05101) in one pass over memory: unscale, clip, update
//! and cast.
//!
//! One sequence of operations for every path, written once in [`element`]: fused multiply-adds
//! where written, correctly rounded square root and division, no flush to zero. The paths are the
//! same loop compiled for different instruction sets, so they give the same bits:
//!
//! ```text
//! g = gradient * scale
//! m = fma(beta1, m, (1 - beta1) * g)
//! v = fma(beta2, v, ((1 - beta2) * g) * g)
//! p = fma(-lr / (1 - beta1^t), m / fma(sqrt(v), 1 / sqrt(1 - beta2^t), eps), p * (1 - lr * decay))
//! ```

pub(super) mod ahead;
pub(super) mod past_caches;
pub(super) mod paths;
mod traffic;

use std::ops::Range;

use half::{bf16, f16};

use super::isa::Isa;
use super::shared::Shared;
use super::workers::Workers;

use paths::{StateSlices, Value};

pub use ahead::{Kept, adamw_ahead, adamw_rest, adamw_undo, log_bytes};
pub use traffic::adam_traffic;

/// Elements that one worker takes at a time: 28 bytes each, about a second-level cache.
pub(super) const CHUNK: usize = 32 << 10;

/// Constants of AdamW, as `torch.optim.AdamW` names them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the denominator.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

impl AdamW {
    /// The scalars of applied step `step`, counted from 1, with the gradient multiplied by
    /// `grad_scale` (loss scale and clipping). Computed in f64, rounded once.
    pub fn at(&self, step: u64, lr: f64, grad_scale: f64) -> AdamScalars {
        let power = |beta: f64| beta.powf(step as f64);
        AdamScalars {
            grad_scale: grad_scale as f32,
            keep: (1.0 - lr * self.weight_decay) as f32,
            beta1: self.beta1 as f32,
            one_minus_beta1: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            one_minus_beta2: (1.0 - self.beta2) as f32,
            eps: self.eps as f32,
            minus_rate: (-lr / (1.0 - power(self.beta1))) as f32,
            root_correction: (1.0 / (1.0 - power(self.beta2)).sqrt()) as f32,
        }
    }
}

/// The scalars of one step; from [`AdamW::at`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamScalars {
    grad_scale: f32,
    keep: f32,
    beta1: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    eps: f32,
    minus_rate: f32,
    root_correction: f32,
}

impl AdamScalars {
    /// Scalars under which an update leaves all states as they are and only casts the master:
    /// what a skipped step, or parameters derived anew, ask for.
    pub fn unchanged() -> Self {
        Self {
            grad_scale: 0.0,
            keep: 1.0,
            beta1: 1.0,
            one_minus_beta1: 0.0,
            beta2: 1.0,
            one_minus_beta2: 0.0,
            eps: 1.0,
            minus_rate: 0.0,
            root_correction: 1.0,
        }
    }

    /// In the order in which they are declared: for the device.
    pub(crate) fn as_array(&self) -> [f32; 9] {
        [
            self.grad_scale,
            self.keep,
            self.beta1,
            self.one_minus_beta1,
            self.beta2,
            self.one_minus_beta2,
            self.eps,
            self.minus_rate,
            self.root_correction,
        ]
    }

    /// Whether these are [`AdamScalars::unchanged`]: then the gradient is not looked at, for
    /// 0 times infinity would be NaN.
    pub fn is_unchanged(&self) -> bool {
        *self == Self::unchanged()
    }
}

/// The states of a run of elements, all of one length.
#[derive(Debug)]
pub struct States<'a> {
    /// fp32 parameters.
    pub master: &'a mut [f32],
    /// First moments.
    pub m: &'a mut [f32],
    /// Second moments.
    pub v: &'a mut [f32],
}

/// Gradient in, parameter out, each as long as the states.
#[derive(Debug)]
pub enum Exchange<'a> {
    /// Both in f32.
    F32 {
        /// Read.
        grad: &'a [f32],
        /// Written.
        param: &'a mut [f32],
    },
    /// Both in f32; the parameter replaces the gradient.
    InPlaceF32(&'a mut [f32]),
    /// Both in bf16.
    Bf16 {
        /// Read.
        grad: &'a [bf16],
        /// Written.
        param: &'a mut [bf16],
    },
    /// Both in bf16; the parameter replaces the gradient.
    InPlaceBf16(&'a mut [bf16]),
    /// Gradient in f32, parameter in bf16.
    F32ToBf16 {
        /// Read.
        grad: &'a [f32],
        /// Written.
        param: &'a mut [bf16],
    },
    /// Gradient in bf16, parameter in f32.
    Bf16ToF32 {
        /// Read.
        grad: &'a [bf16],
        /// Written.
        param: &'a mut [f32],
    },
    /// Both in f16.
    F16 {
        /// Read.
        grad: &'a [f16],
        /// Written.
        param: &'a mut [f16],
    },
    /// Both in f16; the parameter replaces the gradient.
    InPlaceF16(&'a mut [f16]),
    /// Gradient in f32, parameter in f16.
    F32ToF16 {
        /// Read.
        grad: &'a [f32],
        /// Written.
        param: &'a mut [f16],
    },
    /// Gradient in f16, parameter in f32.
    F16ToF32 {
        /// Read.
        grad: &'a [f16],
        /// Written.
        param: &'a mut [f32],
    },
}

impl States<'_> {
    /// The same states, for a shorter time.
    pub fn reborrow(&mut self) -> States<'_> {
        States {
            master: self.master,
            m: self.m,
            v: self.v,
        }
    }
}

impl Exchange<'_> {
    /// The same exchange, for a shorter time.
    pub fn reborrow(&mut self) -> Exchange<'_> {
        match self {
            Self::F32 { grad, param } => Exchange::F32 { grad, param },
            Self::InPlaceF32(both) => Exchange::InPlaceF32(both),
            Self::Bf16 { grad, param } => Exchange::Bf16 { grad, param },
            Self::InPlaceBf16(both) => Exchange::InPlaceBf16(both),
            Self::F32ToBf16 { grad, param } => Exchange::F32ToBf16 { grad, param },
            Self::Bf16ToF32 { grad, param } => Exchange::Bf16ToF32 { grad, param },
            Self::F16 { grad, param } => Exchange::F16 { grad, param },
            Self::InPlaceF16(both) => Exchange::InPlaceF16(both),
            Self::F32ToF16 { grad, param } => Exchange::F32ToF16 { grad, param },
            Self::F16ToF32 { grad, param } => Exchange::F16ToF32 { grad, param },
        }
    }

    /// A split master is of a bf16 parameter that has a place of its own.
    pub(super) fn check_split(&self) {
        let own = matches!(self, Self::Bf16 { .. } | Self::F32ToBf16 { .. });
        assert!(own, "a split master needs a bf16 parameter of its own");
    }

    /// Elements of the gradient and of the parameter.
    pub fn lens(&self) -> (usize, usize) {
        match self {
            Self::F32 { grad, param } => (grad.len(), param.len()),
            Self::InPlaceF32(both) => (both.len(), both.len()),
            Self::Bf16 { grad, param } => (grad.len(), param.len()),
            Self::InPlaceBf16(both) => (both.len(), both.len()),
            Self::F32ToBf16 { grad, param } => (grad.len(), param.len()),
            Self::Bf16ToF32 { grad, param } => (grad.len(), param.len()),
            Self::F16 { grad, param } => (grad.len(), param.len()),
            Self::InPlaceF16(both) => (both.len(), both.len()),
            Self::F32ToF16 { grad, param } => (grad.len(), param.len()),
            Self::F16ToF32 { grad, param } => (grad.len(), param.len()),
        }
    }
}

/// Updates a run of elements on this thread.
///
/// # Panics
/// If lengths differ, or this machine cannot run `isa`.
pub fn adamw(isa: Isa, scalars: &AdamScalars, states: States<'_>, exchange: Exchange<'_>) {
    assert!(isa.runs_here(), "this machine cannot run {isa:?}");
    let len = states.master.len();
    let all = Pieces::new(states, exchange);
    // SAFETY: one piece, alive alone.
    unsafe { all.update(isa, scalars, 0..len) };
}

/// Updates a run of elements on all workers; the same bits as [`adamw`].
///
/// # Panics
/// If lengths differ, or this machine cannot run `isa`.
pub fn adamw_parallel(
    workers: &Workers,
    isa: Isa,
    scalars: &AdamScalars,
    states: States<'_>,
    exchange: Exchange<'_>,
) {
    assert!(isa.runs_here(), "this machine cannot run {isa:?}");
    let len = states.master.len();
    let all = Pieces::new(states, exchange);
    // Of little work each thread gets several pieces too, for threads do not begin at once.
    let piece = len.div_ceil(8 * workers.threads()).clamp(2 << 10, CHUNK);
    let piece = piece.next_multiple_of(past_caches::LINE);
    workers.run(len.div_ceil(piece), &|chunk, _| {
        let range = chunk * piece..((chunk + 1) * piece).min(len);
        // SAFETY: chunks do not overlap.
        unsafe { all.update(isa, scalars, range) };
    });
}

/// Gradient and parameter as shared memory.
pub(super) enum Sides<'a> {
    F32(&'a [f32], Shared<'a, f32>),
    InPlaceF32(Shared<'a, f32>),
    Bf16(&'a [bf16], Shared<'a, bf16>),
    InPlaceBf16(Shared<'a, bf16>),
    F32ToBf16(&'a [f32], Shared<'a, bf16>),
    Bf16ToF32(&'a [bf16], Shared<'a, f32>),
    F16(&'a [f16], Shared<'a, f16>),
    InPlaceF16(Shared<'a, f16>),
    F32ToF16(&'a [f32], Shared<'a, f16>),
    F16ToF32(&'a [f16], Shared<'a, f32>),
}

impl<'a> Sides<'a> {
    pub(super) fn new(exchange: Exchange<'a>) -> Self {
        match exchange {
            Exchange::F32 { grad, param } => Self::F32(grad, Shared::new(param)),
            Exchange::InPlaceF32(both) => Self::InPlaceF32(Shared::new(both)),
            Exchange::Bf16 { grad, param } => Self::Bf16(grad, Shared::new(param)),
            Exchange::InPlaceBf16(both) => Self::InPlaceBf16(Shared::new(both)),
            Exchange::F32ToBf16 { grad, param } => Self::F32ToBf16(grad, Shared::new(param)),
            Exchange::Bf16ToF32 { grad, param } => Self::Bf16ToF32(grad, Shared::new(param)),
            Exchange::F16 { grad, param } => Self::F16(grad, Shared::new(param)),
            Exchange::InPlaceF16(both) => Self::InPlaceF16(Shared::new(both)),
            Exchange::F32ToF16 { grad, param } => Self::F32ToF16(grad, Shared::new(param)),
            Exchange::F16ToF32 { grad, param } => Self::F16ToF32(grad, Shared::new(param)),
        }
    }

    /// Hands gradient and parameter of a run of elements to what works on them, in the types that they have.
    ///
    /// # Safety
    /// The elements are in no other piece alive; and what the visitor asks for.
    pub(super) unsafe fn visit<V: VisitSides>(&self, range: Range<usize>, visitor: V) -> V::Output {
        // SAFETY: disjoint by the contract above.
        unsafe {
            match self {
                Self::F32(grad, param) => visitor.apart(&grad[range.clone()], param.piece(range)),
                Self::Bf16(grad, param) => visitor.apart(&grad[range.clone()], param.piece(range)),
                Self::F32ToBf16(grad, param) => {
                    visitor.apart(&grad[range.clone()], param.piece(range))
                }
                Self::Bf16ToF32(grad, param) => {
                    visitor.apart(&grad[range.clone()], param.piece(range))
                }
                Self::F16(grad, param) => visitor.apart(&grad[range.clone()], param.piece(range)),
                Self::F32ToF16(grad, param) => {
                    visitor.apart(&grad[range.clone()], param.piece(range))
                }
                Self::F16ToF32(grad, param) => {
                    visitor.apart(&grad[range.clone()], param.piece(range))
                }
                Self::InPlaceF32(both) => visitor.in_place(both.piece(range)),
                Self::InPlaceBf16(both) => visitor.in_place(both.piece(range)),
                Self::InPlaceF16(both) => visitor.in_place(both.piece(range)),
            }
        }
    }

    /// Bytes of an element of a gradient that the parameter replaces; 0 if it does not.
    pub(super) fn bytes_in_place(&self) -> usize {
        match self {
            Self::InPlaceF32(_) => 4,
            Self::InPlaceBf16(_) | Self::InPlaceF16(_) => 2,
            _ => 0,
        }
    }
}

/// All memory of an update, to be cut into pieces.
struct Pieces<'a> {
    master: Shared<'a, f32>,
    m: Shared<'a, f32>,
    v: Shared<'a, f32>,
    sides: Sides<'a>,
    len: usize,
}

impl<'a> Pieces<'a> {
    fn new(states: States<'a>, exchange: Exchange<'a>) -> Self {
        let len = states.master.len();
        let (grad, param) = exchange.lens();
        let same = [states.m.len(), states.v.len(), grad, param]
            .iter()
            .all(|l| *l == len);
        assert!(same, "states, gradient and parameter differ in length");
        Self {
            master: Shared::new(states.master),
            m: Shared::new(states.m),
            v: Shared::new(states.v),
            sides: Sides::new(exchange),
            len,
        }
    }

    /// # Safety
    /// The elements are in no other piece alive, and this machine runs `isa`.
    unsafe fn update(&self, isa: Isa, scalars: &AdamScalars, range: Range<usize>) {
        // SAFETY: by the contract above.
        unsafe { self.visit(range, Update(isa, scalars)) };
    }
}

/// Memory of an update that can be had in f32, some elements at a time.
pub(super) trait Source: Sync {
    /// Elements.
    fn len(&self) -> usize;

    /// Bytes of an element of a gradient that the parameter replaces; 0 if it does not.
    fn bytes_in_place(&self) -> usize;

    /// Hands a run of elements (at most [`ahead::UNIT`] where they are kept otherwise) to what works on it, in the types
    /// that gradient and parameter have.
    ///
    /// # Safety
    /// The elements are in no other piece alive; and what the visitor asks for.
    unsafe fn visit<V: Visit>(&self, range: Range<usize>, visitor: V) -> V::Output;
}

impl Source for Pieces<'_> {
    fn len(&self) -> usize {
        self.len
    }

    fn bytes_in_place(&self) -> usize {
        self.sides.bytes_in_place()
    }

    unsafe fn visit<V: Visit>(&self, range: Range<usize>, visitor: V) -> V::Output {
        // SAFETY: disjoint by the contract above.
        unsafe {
            let states = (
                self.master.piece(range.clone()),
                self.m.piece(range.clone()),
                self.v.piece(range.clone()),
            );
            self.sides.visit(range, WithStates(states, visitor))
        }
    }
}

/// What works on gradient and parameter, for every kind of exchange.
pub(super) trait VisitSides {
    type Output;

    /// The parameter goes elsewhere than the gradient.
    ///
    /// # Safety
    /// What the implementation asks for.
    unsafe fn apart<G: Value, P: Value>(self, grad: &[G], param: &mut [P]) -> Self::Output;

    /// The parameter replaces the gradient.
    ///
    /// # Safety
    /// What the implementation asks for.
    unsafe fn in_place<T: Value>(self, both: &mut [T]) -> Self::Output;
}

/// What works on states besides.
struct WithStates<'s, V>(StateSlices<'s>, V);

impl<V: Visit> VisitSides for WithStates<'_, V> {
    type Output = V::Output;

    unsafe fn apart<G: Value, P: Value>(self, grad: &[G], param: &mut [P]) -> V::Output {
        // SAFETY: by the same contract.
        unsafe { self.1.apart(self.0, grad, param) }
    }

    unsafe fn in_place<T: Value>(self, both: &mut [T]) -> V::Output {
        // SAFETY: by the same contract.
        unsafe { self.1.in_place(self.0, both) }
    }
}

/// What is done to a run of elements, for every kind of exchange.
pub(super) trait Visit {
    type Output;

    /// The parameter goes elsewhere than the gradient.
    ///
    /// # Safety
    /// What the implementation asks for.
    unsafe fn apart<G: Value, P: Value>(
        self,
        states: StateSlices<'_>,
        grad: &[G],
        param: &mut [P],
    ) -> Self::Output;

    /// The parameter replaces the gradient.
    ///
    /// # Safety
    /// What the implementation asks for.
    unsafe fn in_place<T: Value>(self, states: StateSlices<'_>, both: &mut [T]) -> Self::Output;
}

/// An update. The machine runs the instruction set.
struct Update<'s>(Isa, &'s AdamScalars);

impl Visit for Update<'_> {
    type Output = ();

    unsafe fn apart<G: Value, P: Value>(
        self,
        states: StateSlices<'_>,
        grad: &[G],
        param: &mut [P],
    ) {
        // SAFETY: the machine runs it.
        unsafe { paths::run(self.0, self.1, states, grad, param) };
    }

    unsafe fn in_place<T: Value>(self, states: StateSlices<'_>, both: &mut [T]) {
        // SAFETY: the machine runs it.
        unsafe { paths::run_in_place(self.0, self.1, states, both) };
    }
}

/// One element: `(master, m, v)` after the step.
#[inline(always)]
pub(super) fn element(s: &AdamScalars, grad: f32, p: f32, m: f32, v: f32) -> (f32, f32, f32) {
    let g = grad * s.grad_scale;
    let m = s.beta1.mul_add(m, s.one_minus_beta1 * g);
    let v = s.beta2.mul_add(v, (s.one_minus_beta2 * g) * g);
    let denominator = v.sqrt().mul_add(s.root_correction, s.eps);
    let p = s.minus_rate.mul_add(m / denominator, p * s.keep);
    (p, m, v)
}
