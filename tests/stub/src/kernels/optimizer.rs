//! AdamW, norms of gradients and casts, with the bits that the contract of numbers demands.

use super::{Call, Result};

pub(super) fn adamw(call: &Call<'_>) -> Result<()> {
    let n = call.number("n")?;
    let s = |field| call.field_real("s", field);
    let mut master = call.floats("master", 0, n)?;
    if call.number("unchanged")? == 0 {
        let (scale, keep, eps) = (s("grad_scale")?, s("keep")?, s("eps")?);
        let (beta1, beta2) = (s("beta1")?, s("beta2")?);
        let (rest1, rest2) = (s("one_minus_beta1")?, s("one_minus_beta2")?);
        let (rate, root) = (s("minus_rate")?, s("root_correction")?);
        let grad = call.floats("grad", 0, n)?;
        let (mut m, mut v) = (call.floats("m", 0, n)?, call.floats("v", 0, n)?);
        for i in 0..n {
            let g = grad[i] * scale;
            m[i] = beta1.mul_add(m[i], rest1 * g);
            v[i] = beta2.mul_add(v[i], (rest2 * g) * g);
            let denominator = v[i].sqrt().mul_add(root, eps);
            master[i] = rate.mul_add(m[i] / denominator, master[i] * keep);
        }
        call.put("master", 0, &master)?;
        call.put("m", 0, &m)?;
        call.put("v", 0, &v)?;
    }
    call.put("param", 0, &master)
}

/// Pieces, a block each, of 16 strands of 16 lanes.
pub(super) fn square_sum(call: &Call<'_>) -> Result<()> {
    let (n, strand) = (call.number("n")?, call.number("strand")?);
    let x = call.floats("x", 0, n)?;
    let sum_of = |at: usize| {
        let range = (at * strand).min(n)..((at + 1) * strand).min(n);
        let mut lanes = [0.0f64; 16];
        for (i, x) in x[range].iter().enumerate() {
            lanes[i % 16] += f64::from(*x) * f64::from(*x);
        }
        lanes.iter().fold(0.0, |sum, lane| sum + lane)
    };
    let piece = |block: usize| (0..16).fold(0.0, |sum, s| sum + sum_of(block * 16 + s));
    let sums: Vec<f64> = (0..call.blocks()).map(piece).collect();
    call.put_doubles("sums", &sums)
}

pub(super) fn cast(call: &Call<'_>) -> Result<()> {
    let n = call.number("n")?;
    call.put("to", 0, &call.floats("from", 0, n)?)
}
