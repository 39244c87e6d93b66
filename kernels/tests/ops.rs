//! The decoder's operations: backward passes against finite differences of an f64 forward pass
//! written here, forward passes against it, and equal bits for every number of threads. (The whole
//! decoder is compared with transformers and an f64 oracle in the root's tests.)
#![allow(clippy::unwrap_used)]

use forebay_kernels::KernelError;
use forebay_kernels::cpu::Workers;
use forebay_kernels::cpu::ops::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn random(rng: &mut ChaCha8Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| rng.random_range(-1.0..1.0)).collect()
}

fn distance(got: &[f32], wanted: &[f64]) -> f64 {
    assert_eq!(got.len(), wanted.len());
    let square = |v: f64| v * v;
    let d: f64 = got
        .iter()
        .zip(wanted)
        .map(|(g, w)| square(f64::from(*g) - w))
        .sum();
    (d / wanted.iter().map(|w| square(*w)).sum::<f64>().max(1e-300)).sqrt()
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}

/// The gradient of `loss` at `x`, by central differences in f64.
fn differences(x: &[f32], loss: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    let mut x = wide(x);
    (0..x.len())
        .map(|i| {
            let (kept, h) = (x[i], 1e-5);
            x[i] = kept + h;
            let up = loss(&x);
            x[i] = kept - h;
            let down = loss(&x);
            x[i] = kept;
            (up - down) / (2.0 * h)
        })
        .collect()
}

fn dot(a: &[f64], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * f64::from(*b)).sum()
}

/// Runs `work` on 1, 2 and 5 threads, demands equal bits, and returns the result.
fn on_all(work: impl Fn(&Workers) -> Vec<Vec<f32>>) -> Vec<Vec<f32>> {
    let bits = |r: &[Vec<f32>]| -> Vec<u32> { r.iter().flatten().map(|x| x.to_bits()).collect() };
    let run = |threads| work(&Workers::new(threads, "test").unwrap());
    let one = run(1);
    assert!(
        bits(&one) == bits(&run(2)) && bits(&one) == bits(&run(5)),
        "bits differ by threads"
    );
    one
}

const CLOSE: f64 = 2e-6;

#[test]
fn linear_layers_are_right_for_sizes_around_the_tiles() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for (t, n, k) in [
        (1, 1, 1),
        (3, 5, 7),
        (130, 257, 33),
        (200, 40, 300),
        (129, 512, 64),
    ] {
        let (x, w, dy) = (
            random(&mut rng, t * k),
            random(&mut rng, n * k),
            random(&mut rng, t * n),
        );
        let dw0 = random(&mut rng, n * k);
        let out = on_all(|workers| {
            let (mut y, mut dx) = (vec![0.0; t * n], vec![0.0; t * k]);
            let mut dw = dw0.clone();
            linear(workers, (t, n, k), &x, &w, &mut y);
            linear_dx(workers, (t, n, k), &dy, &w, &mut dx, false);
            let mut twice = dx.clone();
            linear_dx(workers, (t, n, k), &dy, &w, &mut twice, true);
            linear_dw(workers, (t, n, k), &x, &dy, &mut dw);
            vec![y, dx, twice, dw]
        });
        let at = |m: &[f32], cols: usize, r: usize, c: usize| f64::from(m[r * cols + c]);
        let product = |rows: usize,
                       cols: usize,
                       inner: usize,
                       f: &dyn Fn(usize, usize, usize) -> f64|
         -> Vec<f64> {
            (0..rows * cols)
                .map(|i| (0..inner).map(|j| f(i / cols, i % cols, j)).sum())
                .collect()
        };
        let y = product(t, n, k, &|r, c, j| at(&x, k, r, j) * at(&w, k, c, j));
        let dx = product(t, k, n, &|r, c, j| at(&dy, n, r, j) * at(&w, k, j, c));
        let dw = product(n, k, t, &|r, c, j| at(&dy, n, j, r) * at(&x, k, j, c));
        let dw: Vec<f64> = dw
            .iter()
            .zip(&dw0)
            .map(|(d, d0)| d + f64::from(*d0))
            .collect();
        let twice: Vec<f64> = dx.iter().map(|d| 2.0 * d).collect();
        for (name, got, wanted) in [
            ("y", 0, &y),
            ("dx", 1, &dx),
            ("dx twice", 2, &twice),
            ("dw", 3, &dw),
        ] {
            let error = distance(&out[got], wanted);
            assert!(error < CLOSE, "{name} of {t} x {n} x {k}: {error:.2e}");
        }
        // The check can fail: one element off by a thousandth of the largest.
        let mut planted = out[0].clone();
        planted[t * n / 2] += 0.01 * (k as f32).sqrt();
        assert!(t * n > 10_000 || distance(&planted, &y) > CLOSE);
    }
}

fn norm64(x: &[f64], w: &[f64], eps: f64) -> Vec<f64> {
    let n = w.len();
    x.chunks(n)
        .flat_map(|x| {
            let r = (x.iter().map(|x| x * x).sum::<f64>() / n as f64 + eps).sqrt();
            x.iter().zip(w).map(move |(x, w)| w * x / r)
        })
        .collect()
}

#[test]
fn rms_norm_and_its_gradients_are_right() {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    for (rows, cols) in [(1, 4), (5, 12), (70, 9)] {
        let (x, w, dy) = (
            random(&mut rng, rows * cols),
            random(&mut rng, cols),
            random(&mut rng, rows * cols),
        );
        let eps = 1e-3f32;
        let out = on_all(|workers| {
            let (mut y, mut dx) = (vec![0.0; rows * cols], vec![1.0; rows * cols]);
            let mut dw = vec![2.0; cols];
            let mut scratch = vec![f32::NAN; rms_norm_backward_scratch(cols)];
            rms_norm(workers, cols, &x, &w, eps, &mut y);
            rms_norm_backward(
                workers,
                cols,
                &x,
                &w,
                eps,
                &dy,
                &mut dx,
                true,
                &mut dw,
                &mut scratch,
            );
            vec![y, dx, dw]
        });
        let eps = f64::from(eps);
        assert!(distance(&out[0], &norm64(&wide(&x), &wide(&w), eps)) < CLOSE);
        let dx = differences(&x, |x| dot(&norm64(x, &wide(&w), eps), &dy));
        let dw = differences(&w, |w| dot(&norm64(&wide(&x), w, eps), &dy));
        let plus = |v: &[f64], c: f64| v.iter().map(|v| v + c).collect::<Vec<_>>();
        assert!(distance(&out[1], &plus(&dx, 1.0)) < CLOSE, "dx is added to");
        assert!(
            distance(&out[2], &plus(&dw, 2.0)) < CLOSE,
            "dweight is added to"
        );
    }
}

fn attention64(d: AttentionDims, q: &[f64], k: &[f64], v: &[f64]) -> Vec<f64> {
    let AttentionDims {
        batch,
        seq,
        heads,
        kv_heads,
        head_dim,
    } = d;
    let mut out = vec![0.0; q.len()];
    for b in 0..batch {
        for h in 0..heads {
            let kv = h / (heads / kv_heads);
            for t in 0..seq {
                let at_q = ((b * seq + t) * heads + h) * head_dim;
                let at_k = |s: usize| ((b * seq + s) * kv_heads + kv) * head_dim;
                let score = |s: usize| -> f64 {
                    let dot: f64 = (0..head_dim).map(|i| q[at_q + i] * k[at_k(s) + i]).sum();
                    (dot / (head_dim as f64).sqrt()).exp()
                };
                let sum: f64 = (0..=t).map(score).sum();
                for s in 0..=t {
                    for i in 0..head_dim {
                        out[at_q + i] += score(s) / sum * v[at_k(s) + i];
                    }
                }
            }
        }
    }
    out
}

#[test]
fn attention_and_its_gradients_are_right_for_groups_and_odd_lengths() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    for (batch, seq, heads, kv_heads, head_dim, gradients) in [
        (1, 1, 1, 1, 2, true),
        (2, 7, 4, 2, 4, true),
        (1, 9, 4, 1, 6, true),
        (1, 131, 2, 1, 8, false),
    ] {
        let d = AttentionDims {
            batch,
            seq,
            heads,
            kv_heads,
            head_dim,
        };
        let q = random(&mut rng, batch * seq * heads * head_dim);
        let (k, v) = (
            random(&mut rng, batch * seq * kv_heads * head_dim),
            random(&mut rng, batch * seq * kv_heads * head_dim),
        );
        let dout = random(&mut rng, q.len());
        let results = on_all(|workers| {
            let (mut out, mut lse) = (vec![0.0; q.len()], vec![0.0; batch * heads * seq]);
            let mut scratch = vec![f32::NAN; attention_scratch(d, workers.threads())];
            attention(workers, d, &q, &k, &v, &mut out, &mut lse, &mut scratch);
            let (mut dq, mut dk) = (vec![f32::NAN; q.len()], vec![f32::NAN; k.len()]);
            let mut dv = vec![f32::NAN; v.len()];
            let (qkv, rest) = ((&q[..], &k[..], &v[..]), (&out[..], &lse[..], &dout[..]));
            attention_backward(
                workers,
                d,
                qkv,
                rest,
                &mut dq,
                &mut dk,
                &mut dv,
                &mut scratch,
            );
            vec![out, dq, dk, dv]
        });
        let (q64, k64, v64) = (wide(&q), wide(&k), wide(&v));
        assert!(
            distance(&results[0], &attention64(d, &q64, &k64, &v64)) < CLOSE,
            "{d:?}"
        );
        if gradients {
            let dq = differences(&q, |q| dot(&attention64(d, q, &k64, &v64), &dout));
            let dk = differences(&k, |k| dot(&attention64(d, &q64, k, &v64), &dout));
            let dv = differences(&v, |v| dot(&attention64(d, &q64, &k64, v), &dout));
            for (name, got, wanted) in [("dq", 1, dq), ("dk", 2, dk), ("dv", 3, dv)] {
                // A single token's softmax has no slope: both sides are rounding.
                let tiny = wanted.iter().all(|w| w.abs() < 1e-9);
                let error = distance(&results[got], &wanted);
                assert!(tiny || error < CLOSE, "{name} of {d:?}: {error:.2e}");
            }
        }
    }
}

#[test]
fn rope_turns_pairs_by_position_and_back() {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let dims = RopeDims {
        seq: 37,
        heads: 3,
        head_dim: 8,
        theta: 10_000.0,
    };
    let x = random(&mut rng, 2 * 37 * 3 * 8);
    let out = on_all(|workers| {
        let mut turned = x.clone();
        rope(workers, dims, &mut turned, Direction::Forward);
        let mut back = turned.clone();
        rope(workers, dims, &mut back, Direction::Backward);
        vec![turned, back]
    });
    let mut wanted = wide(&x);
    for (row, x) in wanted.chunks_mut(24).enumerate() {
        for x in x.chunks_mut(8) {
            for i in 0..4 {
                let angle = (row % 37) as f64 * 10_000f64.powf(-(i as f64) / 4.0);
                let (a, b) = (x[i], x[i + 4]);
                x[i] = a * angle.cos() - b * angle.sin();
                x[i + 4] = b * angle.cos() + a * angle.sin();
            }
        }
    }
    assert!(distance(&out[0], &wanted) < CLOSE);
    assert!(distance(&out[1], &wide(&x)) < CLOSE);
}

#[test]
fn swiglu_embedding_and_sums_are_right() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let n = 20_003;
    let (gate, up, dout) = (
        random(&mut rng, n),
        random(&mut rng, n),
        random(&mut rng, n),
    );
    let out = on_all(|workers| {
        let [mut y, mut dgate, mut dup, mut sum] = [(); 4].map(|()| vec![0.0; n]);
        swiglu(workers, &gate, &up, &mut y);
        swiglu_backward(workers, &gate, &up, &dout, &mut dgate, &mut dup);
        add(workers, &gate, &up, &mut sum);
        add_assign(workers, &mut sum, &dout);
        vec![y, dgate, dup, sum]
    });
    let f = |g: f64, u: f64| g / (1.0 + (-g).exp()) * u;
    let each = |f: &dyn Fn(f64, f64, f64) -> f64| -> Vec<f64> {
        (0..n)
            .map(|i| f(gate[i].into(), up[i].into(), dout[i].into()))
            .collect()
    };
    let h = 1e-6;
    assert!(distance(&out[0], &each(&|g, u, _| f(g, u))) < CLOSE);
    assert!(
        distance(
            &out[1],
            &each(&|g, u, d| d * (f(g + h, u) - f(g - h, u)) / (2.0 * h))
        ) < CLOSE
    );
    assert!(
        distance(
            &out[2],
            &each(&|g, u, d| d * (f(g, u + h) - f(g, u - h)) / (2.0 * h))
        ) < CLOSE
    );
    assert!(distance(&out[3], &each(&|g, u, d| g + u + d)) < CLOSE);

    let ids: Vec<u32> = (0..300).map(|_| rng.random_range(0..11)).collect();
    let (table, dout) = (random(&mut rng, 11 * 6), random(&mut rng, 300 * 6));
    let out = on_all(|workers| {
        let (mut rows, mut dtable) = (vec![0.0; 300 * 6], vec![1.0; 11 * 6]);
        let low: Vec<_> = table.iter().map(|x| half::f16::from_f32(*x)).collect();
        let wide: Vec<f32> = low.iter().map(|x| x.to_f32()).collect();
        let mut rounded = rows.clone();
        embedding(workers, 6, &ids, &wide, &mut rounded).unwrap();
        embedding(workers, 6, &ids, &low, &mut rows).unwrap();
        assert_eq!(rows, rounded, "rows of f16 come widened");
        let low: Vec<_> = table.iter().map(|x| half::bf16::from_f32(*x)).collect();
        let wide: Vec<f32> = low.iter().map(|x| x.to_f32()).collect();
        let mut rounded = rows.clone();
        embedding(workers, 6, &ids, &wide, &mut rounded).unwrap();
        embedding(workers, 6, &ids, &low, &mut rows).unwrap();
        assert_eq!(rows, rounded, "rows of bf16 come widened");
        embedding(workers, 6, &ids, &table, &mut rows).unwrap();
        embedding_backward(workers, 6, &ids, &dout, &mut dtable).unwrap();
        vec![rows, dtable]
    });
    let mut dtable = vec![1.0; 66];
    for (t, id) in ids.iter().enumerate() {
        for c in 0..6 {
            assert_eq!(out[0][t * 6 + c], table[*id as usize * 6 + c]);
            dtable[*id as usize * 6 + c] += f64::from(dout[t * 6 + c]);
        }
    }
    assert!(distance(&out[1], &dtable) < CLOSE);
}

#[test]
fn the_classifier_and_its_gradients_are_right_across_tiles() {
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    for (tokens, hidden, vocabulary, gradients) in
        [(1, 3, 2, true), (5, 4, 17, true), (70, 6, 1100, false)]
    {
        let dims = ClassifierDims {
            tokens,
            hidden,
            vocabulary,
        };
        let (x, w) = (
            random(&mut rng, tokens * hidden),
            random(&mut rng, vocabulary * hidden),
        );
        let mut targets: Vec<u32> = (0..tokens)
            .map(|_| rng.random_range(0..vocabulary as u32))
            .collect();
        if tokens > 3 {
            targets[2] = IGNORED;
        }
        let scale = 0.3f32;
        let results = on_all(|workers| {
            let mut scratch = vec![f32::NAN; cross_entropy_scratch(dims, workers.threads())];
            let (mut dx, mut dweight) = (vec![f32::NAN; x.len()], vec![1.0; w.len()]);
            let (mut loss, mut alone) = (0.0, 0.0);
            let grads = ClassifierGrads {
                dx: &mut dx,
                dweight: &mut dweight,
                scale: 1.0,
            };
            cross_entropy(
                workers,
                dims,
                &x,
                &w,
                &targets,
                scale,
                &mut loss,
                Some(grads),
                &mut scratch,
            )
            .unwrap();
            cross_entropy(
                workers,
                dims,
                &x,
                &w,
                &targets,
                scale,
                &mut alone,
                None,
                &mut scratch,
            )
            .unwrap();
            assert_eq!(loss.to_bits(), alone.to_bits());
            let (mut scaled, mut dscaled) = (vec![f32::NAN; x.len()], vec![1024.0; w.len()]);
            let grads = ClassifierGrads {
                dx: &mut scaled,
                dweight: &mut dscaled,
                scale: 1024.0,
            };
            let (loss, room) = (&mut loss, &mut scratch);
            cross_entropy(
                workers,
                dims,
                &x,
                &w,
                &targets,
                scale,
                loss,
                Some(grads),
                room,
            )
            .unwrap();
            // A power of two goes through, and not to the loss.
            let same = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| *a == 1024.0 * b);
            assert!(same(&scaled, &dx) && same(&dscaled, &dweight));
            assert_eq!(loss.to_bits(), alone.to_bits());
            vec![vec![*loss], dx, dweight]
        });
        let loss = |x: &[f64], w: &[f64]| -> f64 {
            let row = |t: usize, v: usize| -> f64 {
                (0..hidden)
                    .map(|i| x[t * hidden + i] * w[v * hidden + i])
                    .sum()
            };
            let counted = (0..tokens).filter(|t| targets[*t] != IGNORED);
            counted
                .map(|t| {
                    let sum: f64 = (0..vocabulary).map(|v| row(t, v).exp()).sum();
                    f64::from(scale) * (sum.ln() - row(t, targets[t] as usize))
                })
                .sum()
        };
        assert!(distance(&results[0], &[loss(&wide(&x), &wide(&w))]) < CLOSE);
        if gradients {
            let dx = differences(&x, |x| loss(x, &wide(&w)));
            let dw = differences(&w, |w| loss(&wide(&x), w));
            let dw: Vec<f64> = dw.iter().map(|d| d + 1.0).collect();
            assert!(distance(&results[1], &dx) < CLOSE && distance(&results[2], &dw) < CLOSE);
        }
    }
}

#[test]
fn ids_and_targets_outside_the_vocabulary_are_errors() {
    let workers = Workers::new(1, "test").unwrap();
    let error = embedding(&workers, 2, &[0, 7], &[0.0f32; 14 - 2], &mut [0.0; 4]).unwrap_err();
    let wanted = KernelError::IdOutOfRange {
        id: 7,
        position: 1,
        vocabulary: 6,
    };
    assert_eq!(error, wanted);
    let dims = ClassifierDims {
        tokens: 1,
        hidden: 1,
        vocabulary: 3,
    };
    let mut scratch = vec![0.0; cross_entropy_scratch(dims, 1)];
    let result = cross_entropy(
        &workers,
        dims,
        &[1.0],
        &[1.0; 3],
        &[3],
        1.0,
        &mut 0.0,
        None,
        &mut scratch,
    );
    assert_eq!(
        result,
        Err(KernelError::IdOutOfRange {
            id: 3,
            position: 0,
            vocabulary: 3
        })
    );
}
