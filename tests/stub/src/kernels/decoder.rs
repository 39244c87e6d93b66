//! The decoder's operations but attention.

use super::{Call, Result};

/// A target that does not count.
const IGNORED: u32 = u32::MAX;

pub(super) fn add(call: &Call<'_>) -> Result<()> {
    let n = call.number("n")?;
    let (a, b) = (call.floats("a", 0, n)?, call.floats("b", 0, n)?);
    let sums: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a + b).collect();
    call.put("out", 0, &sums)
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

pub(super) fn swiglu(call: &Call<'_>) -> Result<()> {
    let n = call.number("n")?;
    let (gate, up) = (call.floats("gate", 0, n)?, call.floats("up", 0, n)?);
    let out = gate.iter().zip(&up).map(|(g, u)| g * sigmoid(*g) * u);
    call.put("out", 0, &out.collect::<Vec<_>>())
}

pub(super) fn swiglu_backward(call: &Call<'_>) -> Result<()> {
    let n = call.number("n")?;
    let (gate, up) = (call.floats("gate", 0, n)?, call.floats("up", 0, n)?);
    let dout = call.floats("dout", 0, n)?;
    let (mut dgate, mut dup) = (vec![0.0; n], vec![0.0; n]);
    for i in 0..n {
        let s = sigmoid(gate[i]);
        let silu = gate[i] * s;
        dgate[i] = dout[i] * up[i] * (s + silu * (1.0 - s));
        dup[i] = dout[i] * silu;
    }
    call.put("dgate", 0, &dgate)?;
    call.put("dup", 0, &dup)
}

fn scale_of(row: &[f32], eps: f32) -> f32 {
    let squares: f32 = row.iter().map(|x| x * x).sum();
    1.0 / (squares / row.len() as f32 + eps).sqrt()
}

pub(super) fn rms_norm(call: &Call<'_>) -> Result<()> {
    let (rows, cols) = (call.number("rows")?, call.number("cols")?);
    let eps = call.real("eps")? as f32;
    let (x, weight) = (
        call.floats("x", 0, rows * cols)?,
        call.floats("weight", 0, cols)?,
    );
    let mut y = Vec::with_capacity(x.len());
    for row in x.chunks(cols) {
        let scale = scale_of(row, eps);
        y.extend(row.iter().zip(&weight).map(|(x, w)| w * (x * scale)));
    }
    call.put("y", 0, &y)
}

pub(super) fn rms_norm_backward(call: &Call<'_>) -> Result<()> {
    let (rows, cols) = (call.number("rows")?, call.number("cols")?);
    let (eps, n) = (call.real("eps")? as f32, rows * cols);
    let (x, weight) = (call.floats("x", 0, n)?, call.floats("weight", 0, cols)?);
    let dy = call.floats("dy", 0, n)?;
    let mut dx = match call.number("assign")? {
        0 => vec![0.0; n],
        _ => call.floats("dx", 0, n)?,
    };
    // All in the first block's part; the others' are nothing.
    let mut partial = vec![0.0; call.blocks() * cols];
    for row in 0..rows {
        let at = row * cols..(row + 1) * cols;
        let (x, dy, dx) = (&x[at.clone()], &dy[at.clone()], &mut dx[at]);
        let scale = scale_of(x, eps);
        let dot: f32 = (0..cols).map(|c| x[c] * weight[c] * dy[c]).sum();
        let back = dot * scale * scale / cols as f32;
        for c in 0..cols {
            dx[c] += scale * (weight[c] * dy[c] - x[c] * back);
            partial[c] += dy[c] * x[c] * scale;
        }
    }
    call.put("dx", 0, &dx)?;
    call.put("partial", 0, &partial)
}

pub(super) fn column_sums(call: &Call<'_>) -> Result<()> {
    let (rows, cols) = (call.number("rows")?, call.number("cols")?);
    let partial = call.floats("partial", 0, rows * cols)?;
    let mut total = call.floats("total", 0, cols)?;
    for row in partial.chunks(cols) {
        total.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
    }
    call.put("total", 0, &total)
}

pub(super) fn rope(call: &Call<'_>) -> Result<()> {
    let (seq, batch) = (call.number("seq")?, call.number("batch")?);
    let (heads, dim) = (call.number("heads")?, call.number("head_dim")?);
    let (log2_theta, sign, half) = (call.real("log2_theta")?, call.real("sign")? as f32, dim / 2);
    let mut x = call.floats("x", 0, batch * seq * heads * dim)?;
    for (index, head) in x.chunks_mut(dim).enumerate() {
        let position = (index / heads % seq) as f32;
        for i in 0..half {
            let frequency = (-((2 * i) as f64) / dim as f64 * log2_theta).exp2() as f32;
            let angle = f64::from(position * frequency);
            let (c, s) = (angle.cos() as f32, sign * angle.sin() as f32);
            let (a, b) = (head[i], head[i + half]);
            head[i] = a * c - b * s;
            head[i + half] = b * c + a * s;
        }
    }
    call.put("x", 0, &x)
}

fn bad_input(call: &Call<'_>, at: usize) -> Result<()> {
    call.put_words("fault", &[1 + at as u32])
}

pub(super) fn embedding(call: &Call<'_>) -> Result<()> {
    let (vocabulary, cols) = (call.number("vocabulary")?, call.number("cols")?);
    for (token, id) in call.words("ids", call.blocks())?.iter().enumerate() {
        if *id as usize >= vocabulary {
            bad_input(call, token)?;
            continue;
        }
        let row = call.floats("table", *id as usize * cols, cols)?;
        call.put("out", token * cols, &row)?;
    }
    Ok(())
}

pub(super) fn embedding_chains(call: &Call<'_>) -> Result<()> {
    let (tokens, vocabulary) = (call.number("tokens")?, call.number("vocabulary")?);
    let ids = call.words("ids", tokens)?;
    let (mut next, mut first) = (vec![0; tokens], vec![0; tokens]);
    for (t, id) in ids.iter().enumerate() {
        let after = ids[t + 1..].iter().position(|other| other == id);
        next[t] = after.map_or(tokens, |d| t + 1 + d) as u32;
        let inside = (*id as usize) < vocabulary;
        first[t] = u32::from(inside && !ids[..t].contains(id));
        if !inside {
            bad_input(call, t)?;
        }
    }
    call.put_words("next", &next)?;
    call.put_words("first", &first)
}

pub(super) fn embedding_backward(call: &Call<'_>) -> Result<()> {
    let (tokens, cols) = (call.number("tokens")?, call.number("cols")?);
    let (ids, first) = (call.words("ids", tokens)?, call.words("first", tokens)?);
    let next = call.words("next", tokens)?;
    let dout = call.floats("dout", 0, tokens * cols)?;
    for start in (0..tokens).filter(|t| first[*t] != 0) {
        let mut sums = vec![0.0; cols];
        let mut t = start;
        while t < tokens {
            let row = &dout[t * cols..(t + 1) * cols];
            sums.iter_mut().zip(row).for_each(|(sum, d)| *sum += d);
            t = next[t] as usize;
        }
        let at = ids[start] as usize * cols;
        let mut row = call.floats("dtable", at, cols)?;
        row.iter_mut().zip(&sums).for_each(|(to, sum)| *to += sum);
        call.put("dtable", at, &row)?;
    }
    Ok(())
}

pub(super) fn cross_entropy(call: &Call<'_>) -> Result<()> {
    let rows = call.blocks();
    let (vocabulary, grads) = (call.number("vocabulary")?, call.number("grads")? != 0);
    let (pitch, dpitch) = (call.number("pitch")?, call.number("dpitch")?);
    let scale = call.real("scale")? as f32;
    let targets = call.words("targets", rows)?;
    for (row, target) in targets.iter().enumerate() {
        let counts = (*target as usize) < vocabulary;
        if !counts && *target != IGNORED {
            bad_input(call, row)?;
        }
        let z = call.floats("logits", row * pitch, vocabulary)?;
        let (mut loss, mut dlogits) = (0.0, vec![0.0; vocabulary]);
        if counts {
            let most = z.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f64 = z.iter().map(|z| f64::from((z - most).exp())).sum();
            let lse = most + sum.ln() as f32;
            loss = lse - z[*target as usize];
            for (c, (d, z)) in dlogits.iter_mut().zip(&z).enumerate() {
                let hot = if c == *target as usize { 1.0 } else { 0.0 };
                *d = scale * ((z - lse).exp() - hot);
            }
        }
        call.put("loss", row, &[loss])?;
        if grads {
            call.put("dlogits", row * dpitch, &dlogits)?;
        }
    }
    Ok(())
}

pub(super) fn scaled_sum(call: &Call<'_>) -> Result<()> {
    let (n, scale) = (call.number("n")?, call.real("scale")? as f32);
    let values = call.floats("values", 0, n)?;
    let sum: f64 = values.iter().map(|v| f64::from(*v)).sum();
    call.put("out", 0, &[scale * sum as f32])
}
