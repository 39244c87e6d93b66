//! Causal attention and its gradients, query by query.

use super::{Call, Result};

/// Sizes of q (and of k and v where `kv`), and how to find a head of a token in them.
struct Dims {
    batch: usize,
    seq: usize,
    heads: usize,
    kv_heads: usize,
    d: usize,
}

impl Dims {
    fn of(call: &Call<'_>) -> Result<Self> {
        let field = |name| call.field_number("n", name);
        Ok(Self {
            batch: field("batch")?,
            seq: field("seq")?,
            heads: field("heads")?,
            kv_heads: field("kv_heads")?,
            d: field("d")?,
        })
    }

    fn queries(&self) -> usize {
        self.batch * self.seq * self.heads * self.d
    }

    fn keys(&self) -> usize {
        self.batch * self.seq * self.kv_heads * self.d
    }

    fn scale(&self) -> f32 {
        1.0 / (self.d as f32).sqrt()
    }

    /// Where a query's head starts.
    fn query(&self, batch: usize, token: usize, head: usize) -> usize {
        ((batch * self.seq + token) * self.heads + head) * self.d
    }

    /// Where the key's (and value's) head that goes with a query's starts.
    fn key(&self, batch: usize, token: usize, head: usize) -> usize {
        let kv = head / (self.heads / self.kv_heads);
        ((batch * self.seq + token) * self.kv_heads + kv) * self.d
    }

    /// Where a head of a query has its logsumexp: `[batch, heads, seq]`.
    fn row(&self, batch: usize, token: usize, head: usize) -> usize {
        (batch * self.heads + head) * self.seq + token
    }

    /// Calls with batch, head and query, in a fixed order.
    fn each(&self, mut f: impl FnMut(usize, usize, usize)) {
        for batch in 0..self.batch {
            for head in 0..self.heads {
                (0..self.seq).for_each(|token| f(batch, head, token));
            }
        }
    }
}

/// Sums are taken in f64, so that no order matters to the tolerances of the tests.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let products = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b));
    products.sum::<f64>() as f32
}

fn narrow(sums: &[f64]) -> Vec<f32> {
    sums.iter().map(|sum| *sum as f32).collect()
}

fn add(to: &mut [f64], factor: f32, from: &[f32]) {
    to.iter_mut()
        .zip(from)
        .for_each(|(to, x)| *to += f64::from(factor) * f64::from(*x));
}

pub(super) fn forward(call: &Call<'_>) -> Result<()> {
    let n = Dims::of(call)?;
    let q = call.floats("q", 0, n.queries())?;
    let (k, v) = (
        call.floats("k", 0, n.keys())?,
        call.floats("v", 0, n.keys())?,
    );
    let mut out = vec![0.0f64; n.queries()];
    let mut lse = vec![0.0; n.queries() / n.d];
    n.each(|batch, head, token| {
        let at = n.query(batch, token, head);
        let query = &q[at..at + n.d];
        let key = |t| n.key(batch, t, head);
        let scores: Vec<f32> = (0..=token)
            .map(|t| dot(query, &k[key(t)..key(t) + n.d]) * n.scale())
            .collect();
        let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = scores.iter().map(|s| f64::from((s - most).exp())).sum();
        let sum = sum as f32;
        lse[n.row(batch, token, head)] = most + sum.ln();
        for (t, score) in scores.iter().enumerate() {
            let weight = (score - most).exp() / sum;
            add(&mut out[at..at + n.d], weight, &v[key(t)..key(t) + n.d]);
        }
    });
    call.put("out", 0, &narrow(&out))?;
    call.put("lse", 0, &lse)
}

pub(super) fn delta(call: &Call<'_>) -> Result<()> {
    delta_to(call, "to")
}

fn delta_to(call: &Call<'_>, place: &str) -> Result<()> {
    let n = Dims::of(call)?;
    let (out, dout) = (
        call.floats("out", 0, n.queries())?,
        call.floats("dout", 0, n.queries())?,
    );
    let mut to = vec![0.0; n.queries() / n.d];
    n.each(|batch, head, token| {
        let at = n.query(batch, token, head);
        let (out, dout) = (&out[at..at + n.d], &dout[at..at + n.d]);
        to[n.row(batch, token, head)] = dot(out, dout);
    });
    call.put(place, 0, &to)
}

/// Gradients of q, k and v.
fn backward(call: &Call<'_>) -> Result<[Vec<f32>; 3]> {
    let n = Dims::of(call)?;
    let q = call.floats("q", 0, n.queries())?;
    let (k, v) = (
        call.floats("k", 0, n.keys())?,
        call.floats("v", 0, n.keys())?,
    );
    let dout = call.floats("dout", 0, n.queries())?;
    let rows = n.queries() / n.d;
    let (lse, delta) = (call.floats("lse", 0, rows)?, call.floats("delta", 0, rows)?);
    let mut dq = vec![0.0f64; n.queries()];
    let (mut dk, mut dv) = (vec![0.0f64; n.keys()], vec![0.0f64; n.keys()]);
    n.each(|batch, head, token| {
        let (at, row) = (n.query(batch, token, head), n.row(batch, token, head));
        let (query, dout) = (&q[at..at + n.d], &dout[at..at + n.d]);
        for t in 0..=token {
            let key = n.key(batch, t, head);
            let (k, v) = (&k[key..key + n.d], &v[key..key + n.d]);
            let p = (dot(query, k) * n.scale() - lse[row]).exp();
            let ds = p * (dot(dout, v) - delta[row]) * n.scale();
            add(&mut dq[at..at + n.d], ds, k);
            add(&mut dk[key..key + n.d], ds, query);
            add(&mut dv[key..key + n.d], p, dout);
        }
    });
    Ok([dq, dk, dv].map(|sums| narrow(&sums)))
}

pub(super) fn backward_q(call: &Call<'_>) -> Result<()> {
    let [dq, ..] = backward(call)?;
    call.put("dq", 0, &dq)
}

pub(super) fn delta_and_backward_q(call: &Call<'_>) -> Result<()> {
    delta_to(call, "delta")?;
    backward_q(call)
}

pub(super) fn backward_kv(call: &Call<'_>) -> Result<()> {
    let [_, dk, dv] = backward(call)?;
    call.put("dk", 0, &dk)?;
    call.put("dv", 0, &dv)
}
