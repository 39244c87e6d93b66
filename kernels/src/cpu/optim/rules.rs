//! The rules: each optimizer's constants, its scalars of a step, and what it does to one element.

use crate::cpu::adam::{AdamScalars, element as adam_element};

/// Stochastic gradient descent with momentum, as `torch.optim.SGD` has it (no dampening; weight decay is part of the
/// gradient):
///
/// ```text
/// g = fma(decay, p, gradient * scale)
/// b = fma(momentum, b, g)
/// p = fma(-lr, b or with Nesterov fma(momentum, b, g), p)
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sgd {
    /// Decay of the momentum buffer; 0 for none.
    pub momentum: f64,
    /// Whether the step looks ahead along the momentum (Nesterov).
    pub nesterov: bool,
    /// Weight decay, added to the gradient.
    pub weight_decay: f64,
}

/// Lion (Chen et al., arXiv 2302.06675, algorithm 2):
///
/// ```text
/// g = gradient * scale
/// p = fma(-lr, sign(fma(beta1, m, (1 - beta1) * g)), p * (1 - lr * decay))
/// m = fma(beta2, m, (1 - beta2) * g)
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lion {
    /// Weight of the moment in the step.
    pub beta1: f64,
    /// Decay of the moment.
    pub beta2: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

/// Adagrad (Duchi, Hazan and Singer, JMLR 2011), as `torch.optim.Adagrad` has it:
///
/// ```text
/// g = fma(decay, p, gradient * scale)
/// s = fma(g, g, s)
/// p = fma(-lr / (1 + (t - 1) * lr_decay), g / (sqrt(s) + eps), p)
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adagrad {
    /// How fast the learning rate falls by itself.
    pub lr_decay: f64,
    /// Added to the denominator.
    pub eps: f64,
    /// Weight decay, added to the gradient.
    pub weight_decay: f64,
}

/// LAMB (You et al., arXiv 1904.00962, algorithm 2): the moments of Adam, and steps as long, beside the weights of a
/// tensor, as the learning rate says:
///
/// ```text
/// g = gradient * scale
/// m = fma(beta1, m, (1 - beta1) * g)
/// v = fma(beta2, v, ((1 - beta2) * g) * g)
/// u = fma(decay, p, (m / (1 - beta1^t)) / fma(sqrt(v), 1 / sqrt(1 - beta2^t), eps))
/// p = fma(-lr * |p| / |u|, u, p)           norms of the whole tensor; the ratio is 1 where one of them is 0
/// ```
///
/// Every tensor is scaled so, as in the paper; moments count as they are stored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lamb {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the denominator.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

impl Sgd {
    pub(super) fn at(&self, lr: f64, grad_scale: f64) -> SgdScalars {
        SgdScalars {
            grad_scale: grad_scale as f32,
            decay: self.weight_decay as f32,
            momentum: self.momentum as f32,
            nesterov: f32::from(u8::from(self.nesterov)),
            minus_lr: -lr as f32,
        }
    }
}

impl Lion {
    pub(super) fn at(&self, lr: f64, grad_scale: f64) -> LionScalars {
        LionScalars {
            grad_scale: grad_scale as f32,
            keep: (1.0 - lr * self.weight_decay) as f32,
            beta1: self.beta1 as f32,
            one_minus_beta1: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            one_minus_beta2: (1.0 - self.beta2) as f32,
            minus_lr: -lr as f32,
        }
    }
}

impl Adagrad {
    pub(super) fn at(&self, step: u64, lr: f64, grad_scale: f64) -> AdagradScalars {
        AdagradScalars {
            grad_scale: grad_scale as f32,
            decay: self.weight_decay as f32,
            eps: self.eps as f32,
            minus_rate: (-lr / (1.0 + (step as f64 - 1.0) * self.lr_decay)) as f32,
        }
    }
}

impl Lamb {
    pub(super) fn at(&self, step: u64, lr: f64, grad_scale: f64) -> LambScalars {
        let power = |beta: f64| beta.powf(step as f64);
        LambScalars {
            grad_scale: grad_scale as f32,
            decay: self.weight_decay as f32,
            beta1: self.beta1 as f32,
            one_minus_beta1: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            one_minus_beta2: (1.0 - self.beta2) as f32,
            eps: self.eps as f32,
            correction: (1.0 / (1.0 - power(self.beta1))) as f32,
            root_correction: (1.0 / (1.0 - power(self.beta2)).sqrt()) as f32,
            minus_lr: -lr as f32,
        }
    }
}

/// The scalars of one step of [`Sgd`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SgdScalars {
    grad_scale: f32,
    decay: f32,
    momentum: f32,
    nesterov: f32,
    minus_lr: f32,
}

/// The scalars of one step of [`Lion`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LionScalars {
    grad_scale: f32,
    keep: f32,
    beta1: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    minus_lr: f32,
}

/// The scalars of one step of [`Adagrad`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdagradScalars {
    grad_scale: f32,
    decay: f32,
    eps: f32,
    minus_rate: f32,
}

/// The scalars of one step of [`Lamb`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LambScalars {
    grad_scale: f32,
    decay: f32,
    beta1: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    eps: f32,
    correction: f32,
    root_correction: f32,
    pub(super) minus_lr: f32,
}

impl SgdScalars {
    pub(super) fn as_array(&self) -> [f32; 5] {
        [
            self.grad_scale,
            self.decay,
            self.momentum,
            self.nesterov,
            self.minus_lr,
        ]
    }
}

impl LionScalars {
    pub(super) fn as_array(&self) -> [f32; 7] {
        [
            self.grad_scale,
            self.keep,
            self.beta1,
            self.one_minus_beta1,
            self.beta2,
            self.one_minus_beta2,
            self.minus_lr,
        ]
    }
}

impl AdagradScalars {
    pub(super) fn as_array(&self) -> [f32; 4] {
        [self.grad_scale, self.decay, self.eps, self.minus_rate]
    }
}

impl LambScalars {
    pub(super) fn as_array(&self) -> [f32; 10] {
        [
            self.grad_scale,
            self.decay,
            self.beta1,
            self.one_minus_beta1,
            self.beta2,
            self.one_minus_beta2,
            self.eps,
            self.correction,
            self.root_correction,
            self.minus_lr,
        ]
    }

    /// The moments after the step.
    #[inline(always)]
    pub(super) fn moments(&self, grad: f32, m: f32, v: f32) -> (f32, f32) {
        let g = grad * self.grad_scale;
        let m = self.beta1.mul_add(m, self.one_minus_beta1 * g);
        let v = self.beta2.mul_add(v, (self.one_minus_beta2 * g) * g);
        (m, v)
    }

    /// The direction in which the master goes, from the moments after the step.
    #[inline(always)]
    pub(super) fn direction(&self, p: f32, m: f32, v: f32) -> f32 {
        let denominator = v.sqrt().mul_add(self.root_correction, self.eps);
        self.decay.mul_add(p, (m * self.correction) / denominator)
    }
}

/// What a rule does to one element: `(master, moment, moment)` after the step.
pub(super) trait Rule {
    fn element(&self, grad: f32, p: f32, m: f32, v: f32) -> (f32, f32, f32);
}

impl Rule for AdamScalars {
    #[inline(always)]
    fn element(&self, grad: f32, p: f32, m: f32, v: f32) -> (f32, f32, f32) {
        adam_element(self, grad, p, m, v)
    }
}

impl Rule for SgdScalars {
    #[inline(always)]
    fn element(&self, grad: f32, p: f32, m: f32, _: f32) -> (f32, f32, f32) {
        let g = self.decay.mul_add(p, grad * self.grad_scale);
        let m = self.momentum.mul_add(m, g);
        let ahead = self.momentum.mul_add(m, g);
        let step = if self.nesterov == 0.0 { m } else { ahead };
        (self.minus_lr.mul_add(step, p), m, 0.0)
    }
}

impl Rule for LionScalars {
    #[inline(always)]
    fn element(&self, grad: f32, p: f32, m: f32, _: f32) -> (f32, f32, f32) {
        let g = grad * self.grad_scale;
        let blend = self.beta1.mul_add(m, self.one_minus_beta1 * g);
        let up = if blend > 0.0 { 1.0 } else { 0.0 };
        let sign = if blend < 0.0 { -1.0 } else { up };
        let p = self.minus_lr.mul_add(sign, p * self.keep);
        (p, self.beta2.mul_add(m, self.one_minus_beta2 * g), 0.0)
    }
}

impl Rule for AdagradScalars {
    #[inline(always)]
    fn element(&self, grad: f32, p: f32, s: f32, _: f32) -> (f32, f32, f32) {
        let g = self.decay.mul_add(p, grad * self.grad_scale);
        let s = g.mul_add(g, s);
        (
            self.minus_rate.mul_add(g / (s.sqrt() + self.eps), p),
            s,
            0.0,
        )
    }
}
