//! A decoder in f64, written for clarity alone: forward, loss and every gradient, one loop after
//! another, with nothing shared with the code under test. Its gradients are themselves checked by
//! finite differences (`tests/oracle.rs`).

use std::collections::BTreeMap;

/// Sizes and constants of a decoder, as in its `config.json`.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub(crate) hidden: usize,
    pub(crate) intermediate: usize,
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) vocabulary: usize,
    pub(crate) eps: f64,
    pub(crate) theta: f64,
    pub(crate) tied: bool,
    pub(crate) qk_norm: bool,
}

/// Tensors by Hugging Face name, row-major.
pub(crate) type Tensors = BTreeMap<String, Vec<f64>>;

/// What a pass over a batch gives.
pub(crate) struct Outcome {
    /// [tokens, vocabulary].
    pub(crate) logits: Vec<f64>,
    /// Mean cross-entropy over targets that count.
    pub(crate) loss: f64,
    pub(crate) grads: Tensors,
}

/// A target that does not count.
pub(crate) const IGNORED: u32 = u32::MAX;

impl Shape {
    /// Every tensor's name and size.
    pub(crate) fn tensors(&self) -> Vec<(String, usize)> {
        let (h, i) = (self.hidden, self.intermediate);
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let mut all = vec![
            ("model.embed_tokens.weight".to_owned(), self.vocabulary * h),
            ("model.norm.weight".to_owned(), h),
        ];
        if !self.tied {
            all.push(("lm_head.weight".to_owned(), self.vocabulary * h));
        }
        for layer in 0..self.layers {
            let mut add = |name: &str, size| {
                all.push((format!("model.layers.{layer}.{name}.weight"), size));
            };
            add("input_layernorm", h);
            add("post_attention_layernorm", h);
            add("self_attn.q_proj", q * h);
            add("self_attn.k_proj", kv * h);
            add("self_attn.v_proj", kv * h);
            add("self_attn.o_proj", q * h);
            if self.qk_norm {
                add("self_attn.q_norm", self.head_dim);
                add("self_attn.k_norm", self.head_dim);
            }
            add("mlp.gate_proj", i * h);
            add("mlp.up_proj", i * h);
            add("mlp.down_proj", i * h);
        }
        all
    }
}

/// y[t, n] = x[t, k] · w[n, k]ᵀ
fn linear(x: &[f64], w: &[f64], k: usize) -> Vec<f64> {
    let n = w.len() / k;
    let mut y = Vec::with_capacity(x.len() / k * n);
    for x in x.chunks(k) {
        for w in w.chunks(k) {
            y.push(x.iter().zip(w).map(|(x, w)| x * w).sum());
        }
    }
    y
}

/// Adds to dw and returns dx.
fn linear_backward(x: &[f64], w: &[f64], k: usize, dy: &[f64], dw: &mut [f64]) -> Vec<f64> {
    let n = w.len() / k;
    let mut dx = vec![0.0; x.len()];
    for t in 0..x.len() / k {
        for o in 0..n {
            let d = dy[t * n + o];
            for i in 0..k {
                dx[t * k + i] += d * w[o * k + i];
                dw[o * k + i] += d * x[t * k + i];
            }
        }
    }
    dx
}

fn rms_norm(x: &[f64], w: &[f64], eps: f64) -> Vec<f64> {
    let n = w.len();
    let mut y = Vec::with_capacity(x.len());
    for x in x.chunks(n) {
        let r = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / n as f64 + eps).sqrt();
        y.extend(x.iter().zip(w).map(|(x, w)| w * x * r));
    }
    y
}

fn rms_norm_backward(x: &[f64], w: &[f64], eps: f64, dy: &[f64], dw: &mut [f64]) -> Vec<f64> {
    let n = w.len();
    let mut dx = Vec::with_capacity(x.len());
    for (x, dy) in x.chunks(n).zip(dy.chunks(n)) {
        let r = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / n as f64 + eps).sqrt();
        let dot: f64 = (0..n).map(|i| dy[i] * w[i] * x[i]).sum();
        for i in 0..n {
            dw[i] += dy[i] * x[i] * r;
            dx.push(dy[i] * w[i] * r - x[i] * r.powi(3) * dot / n as f64);
        }
    }
    dx
}

/// Turns pairs (i, i + d/2) of each head by position · theta^(-2i/d), times `sign`.
fn rope(x: &mut [f64], shape: &Shape, heads: usize, seq: usize, sign: f64) {
    let d = shape.head_dim;
    for (row, x) in x.chunks_mut(heads * d).enumerate() {
        let position = (row % seq) as f64;
        for x in x.chunks_mut(d) {
            for i in 0..d / 2 {
                let angle = position * shape.theta.powf(-2.0 * i as f64 / d as f64);
                let (c, s) = (angle.cos(), sign * angle.sin());
                let (a, b) = (x[i], x[i + d / 2]);
                x[i] = a * c - b * s;
                x[i + d / 2] = b * c + a * s;
            }
        }
    }
}

/// Probabilities of query `t` of head `h` in sequence `b` over keys 0..=t.
fn probabilities(
    shape: &Shape,
    q: &[f64],
    k: &[f64],
    seq: usize,
    at: (usize, usize, usize),
) -> Vec<f64> {
    let (b, h, t) = at;
    let d = shape.head_dim;
    let q = &q[((b * seq + t) * shape.heads + h) * d..][..d];
    let kv = h * shape.kv_heads / shape.heads;
    let scores: Vec<f64> = (0..=t)
        .map(|s| {
            let k = &k[((b * seq + s) * shape.kv_heads + kv) * d..][..d];
            q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() / (d as f64).sqrt()
        })
        .collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exp: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
    let sum: f64 = exp.iter().sum();
    exp.into_iter().map(|e| e / sum).collect()
}

/// Every (sequence, head, query).
fn queries(
    shape: &Shape,
    tokens: usize,
    seq: usize,
) -> impl Iterator<Item = (usize, usize, usize)> {
    let heads = shape.heads;
    (0..tokens / seq)
        .flat_map(move |b| (0..heads).flat_map(move |h| (0..seq).map(move |t| (b, h, t))))
}

fn attention(shape: &Shape, q: &[f64], k: &[f64], v: &[f64], seq: usize) -> Vec<f64> {
    let d = shape.head_dim;
    let mut out = vec![0.0; q.len()];
    for (b, h, t) in queries(shape, q.len() / (shape.heads * d), seq) {
        let kv = h * shape.kv_heads / shape.heads;
        for (s, p) in probabilities(shape, q, k, seq, (b, h, t))
            .into_iter()
            .enumerate()
        {
            for i in 0..d {
                out[((b * seq + t) * shape.heads + h) * d + i] +=
                    p * v[((b * seq + s) * shape.kv_heads + kv) * d + i];
            }
        }
    }
    out
}

/// dq, dk, dv.
fn attention_backward(
    shape: &Shape,
    q: &[f64],
    k: &[f64],
    v: &[f64],
    dout: &[f64],
    seq: usize,
) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let d = shape.head_dim;
    let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
    for (b, h, t) in queries(shape, q.len() / (shape.heads * d), seq) {
        let kv = h * shape.kv_heads / shape.heads;
        let at_q = ((b * seq + t) * shape.heads + h) * d;
        let at_k = |s: usize| ((b * seq + s) * shape.kv_heads + kv) * d;
        let p = probabilities(shape, q, k, seq, (b, h, t));
        let dp: Vec<f64> = (0..=t)
            .map(|s| (0..d).map(|i| dout[at_q + i] * v[at_k(s) + i]).sum())
            .collect();
        let mean: f64 = p.iter().zip(&dp).map(|(p, dp)| p * dp).sum();
        for s in 0..=t {
            let ds = p[s] * (dp[s] - mean) / (d as f64).sqrt();
            for i in 0..d {
                dv[at_k(s) + i] += p[s] * dout[at_q + i];
                dq[at_q + i] += ds * k[at_k(s) + i];
                dk[at_k(s) + i] += ds * q[at_q + i];
            }
        }
    }
    (dq, dk, dv)
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// What a layer's forward pass keeps for its backward pass.
struct Kept {
    x: Vec<f64>,
    normed: Vec<f64>,
    raw_q: Vec<f64>,
    raw_k: Vec<f64>,
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    out: Vec<f64>,
    middle: Vec<f64>,
    normed_mlp: Vec<f64>,
    gate: Vec<f64>,
    up: Vec<f64>,
    inner: Vec<f64>,
}

fn add(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

fn forward(
    shape: &Shape,
    w: &dyn Fn(&str) -> Vec<f64>,
    x: Vec<f64>,
    seq: usize,
) -> (Kept, Vec<f64>) {
    let h = shape.hidden;
    let normed = rms_norm(&x, &w("input_layernorm"), shape.eps);
    let raw_q = linear(&normed, &w("self_attn.q_proj"), h);
    let raw_k = linear(&normed, &w("self_attn.k_proj"), h);
    let v = linear(&normed, &w("self_attn.v_proj"), h);
    let (mut q, mut k) = (raw_q.clone(), raw_k.clone());
    if shape.qk_norm {
        q = rms_norm(&q, &w("self_attn.q_norm"), shape.eps);
        k = rms_norm(&k, &w("self_attn.k_norm"), shape.eps);
    }
    rope(&mut q, shape, shape.heads, seq, 1.0);
    rope(&mut k, shape, shape.kv_heads, seq, 1.0);
    let out = attention(shape, &q, &k, &v, seq);
    let middle = add(
        &x,
        &linear(&out, &w("self_attn.o_proj"), shape.heads * shape.head_dim),
    );
    let normed_mlp = rms_norm(&middle, &w("post_attention_layernorm"), shape.eps);
    let gate = linear(&normed_mlp, &w("mlp.gate_proj"), h);
    let up = linear(&normed_mlp, &w("mlp.up_proj"), h);
    let inner: Vec<f64> = gate
        .iter()
        .zip(&up)
        .map(|(g, u)| g * sigmoid(*g) * u)
        .collect();
    let y = add(
        &middle,
        &linear(&inner, &w("mlp.down_proj"), shape.intermediate),
    );
    let kept = Kept {
        x,
        normed,
        raw_q,
        raw_k,
        q,
        k,
        v,
        out,
        middle,
        normed_mlp,
        gate,
        up,
        inner,
    };
    (kept, y)
}

/// Adds to the gradients of the layer named by `name` and returns that of its input.
fn backward(
    shape: &Shape,
    w: &dyn Fn(&str) -> Vec<f64>,
    name: &dyn Fn(&str) -> String,
    kept: &Kept,
    dy: &[f64],
    seq: usize,
    grads: &mut Tensors,
) -> Vec<f64> {
    let (h, i) = (shape.hidden, shape.intermediate);
    let mut g = |key: &str| grads.remove(&name(key)).unwrap();
    let mut done = Tensors::new();
    let mut dw = g("mlp.down_proj");
    let dinner = linear_backward(&kept.inner, &w("mlp.down_proj"), i, dy, &mut dw);
    done.insert(name("mlp.down_proj"), dw);
    let (mut dgate, mut dup) = (Vec::new(), Vec::new());
    for ((gate, up), d) in kept.gate.iter().zip(&kept.up).zip(&dinner) {
        let s = sigmoid(*gate);
        dup.push(d * gate * s);
        dgate.push(d * up * (s + gate * s * (1.0 - s)));
    }
    let mut dnormed = vec![0.0; kept.x.len()];
    for (key, d) in [("mlp.gate_proj", &dgate), ("mlp.up_proj", &dup)] {
        let mut dw = g(key);
        dnormed = add(
            &dnormed,
            &linear_backward(&kept.normed_mlp, &w(key), h, d, &mut dw),
        );
        done.insert(name(key), dw);
    }
    let mut dw = g("post_attention_layernorm");
    let weight = w("post_attention_layernorm");
    let dmiddle = add(
        dy,
        &rms_norm_backward(&kept.middle, &weight, shape.eps, &dnormed, &mut dw),
    );
    done.insert(name("post_attention_layernorm"), dw);
    let mut dw = g("self_attn.o_proj");
    let width = shape.heads * shape.head_dim;
    let dout = linear_backward(&kept.out, &w("self_attn.o_proj"), width, &dmiddle, &mut dw);
    done.insert(name("self_attn.o_proj"), dw);
    let (mut dq, mut dk, dv) = attention_backward(shape, &kept.q, &kept.k, &kept.v, &dout, seq);
    rope(&mut dq, shape, shape.heads, seq, -1.0);
    rope(&mut dk, shape, shape.kv_heads, seq, -1.0);
    if shape.qk_norm {
        for (key, raw, d) in [
            ("self_attn.q_norm", &kept.raw_q, &mut dq),
            ("self_attn.k_norm", &kept.raw_k, &mut dk),
        ] {
            let mut dw = g(key);
            *d = rms_norm_backward(raw, &w(key), shape.eps, d, &mut dw);
            done.insert(name(key), dw);
        }
    }
    let mut dnormed = vec![0.0; kept.x.len()];
    for (key, d) in [
        ("self_attn.q_proj", &dq),
        ("self_attn.k_proj", &dk),
        ("self_attn.v_proj", &dv),
    ] {
        let mut dw = g(key);
        dnormed = add(
            &dnormed,
            &linear_backward(&kept.normed, &w(key), h, d, &mut dw),
        );
        done.insert(name(key), dw);
    }
    let mut dw = g("input_layernorm");
    let weight = w("input_layernorm");
    let dx = add(
        &dmiddle,
        &rms_norm_backward(&kept.x, &weight, shape.eps, &dnormed, &mut dw),
    );
    done.insert(name("input_layernorm"), dw);
    grads.append(&mut done);
    dx
}

/// Runs a batch of sequences of `seq` tokens.
pub(crate) fn run(
    shape: &Shape,
    weights: &Tensors,
    ids: &[u32],
    targets: &[u32],
    seq: usize,
) -> Outcome {
    let h = shape.hidden;
    let embed = "model.embed_tokens.weight";
    let head = if shape.tied { embed } else { "lm_head.weight" };
    let name = |layer: usize| move |key: &str| format!("model.layers.{layer}.{key}.weight");
    let table = &weights[embed];
    let mut x: Vec<f64> = ids
        .iter()
        .flat_map(|id| {
            table[*id as usize * h..(*id as usize + 1) * h]
                .iter()
                .copied()
        })
        .collect();
    let mut kept = Vec::new();
    for layer in 0..shape.layers {
        let w = |key: &str| weights[&name(layer)(key)].clone();
        let (keep, y) = forward(shape, &w, x, seq);
        kept.push(keep);
        x = y;
    }
    let norm = &weights["model.norm.weight"];
    let normed = rms_norm(&x, norm, shape.eps);
    let logits = linear(&normed, &weights[head], h);

    let counted = targets.iter().filter(|t| **t != IGNORED).count() as f64;
    let mut loss = 0.0;
    let mut dlogits = vec![0.0; logits.len()];
    let v = shape.vocabulary;
    for (t, target) in targets.iter().enumerate().filter(|(_, t)| **t != IGNORED) {
        let row = &logits[t * v..(t + 1) * v];
        let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = row.iter().map(|l| (l - max).exp()).sum();
        loss += (max + sum.ln() - row[*target as usize]) / counted;
        for (i, l) in row.iter().enumerate() {
            let hit = if i == *target as usize { 1.0 } else { 0.0 };
            dlogits[t * v + i] = ((l - max).exp() / sum - hit) / counted;
        }
    }

    let mut grads: Tensors = shape
        .tensors()
        .into_iter()
        .map(|(name, size)| (name, vec![0.0; size]))
        .collect();
    let dnormed = linear_backward(
        &normed,
        &weights[head],
        h,
        &dlogits,
        grads.get_mut(head).unwrap(),
    );
    let dnorm = grads.get_mut("model.norm.weight").unwrap();
    let mut dx = rms_norm_backward(&x, norm, shape.eps, &dnormed, dnorm);
    for layer in (0..shape.layers).rev() {
        let w = |key: &str| weights[&name(layer)(key)].clone();
        dx = backward(shape, &w, &name(layer), &kept[layer], &dx, seq, &mut grads);
    }
    let dtable = grads.get_mut(embed).unwrap();
    for (t, id) in ids.iter().enumerate() {
        for i in 0..h {
            dtable[*id as usize * h + i] += dx[t * h + i];
        }
    }
    Outcome {
        logits,
        loss,
        grads,
    }
}

/// ‖a - b‖ / ‖b‖.
pub(crate) fn distance(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let difference = square(&mut a.iter().zip(b).map(|(a, b)| a - b));
    difference / square(&mut b.iter().copied()).max(1e-300)
}
