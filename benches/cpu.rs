//! The CPU kernels beside their ceilings: AdamW against a bare pass over as much memory, the linear
//! layer against a bare call of the matrix product.
//!
//! Goals: ratios on the machine at hand, and benchmarks that still run. Not: absolute figures to
//! compare between machines.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use forebay_kernels::cpu::{
    AdamW, Exchange, Isa, Kept, States, Workers, adamw_ahead, adamw_parallel, f32_to_bf16,
    log_bytes, ops,
};
use half::bf16;

const ADAM: AdamW = AdamW {
    lr: 1e-3,
    beta1: 0.9,
    beta2: 0.95,
    eps: 1e-8,
    weight_decay: 0.1,
};
/// Far beyond any cache.
const ELEMENTS: usize = 16 << 20;

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// bf16 in and out, 28 bytes an element, and the same with a log of what is overwritten: 3 to 4 bytes more.
fn ahead(c: &mut Criterion) {
    let workers = Workers::new(threads(), "bench").expect("threads");
    let mut state = 1u64;
    let mut noise = |scale: f32| -> Vec<f32> {
        let mut next = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            scale * ((state >> 40) as f32 / (1 << 23) as f32 - 1.0)
        };
        (0..ELEMENTS).map(|_| next() + next()).collect()
    };
    let (mut master, mut m, mut v) = (noise(0.02), noise(2e-5), vec![1e-8f32; ELEMENTS]);
    let (mut grad, mut param) = (vec![bf16::ZERO; ELEMENTS], vec![bf16::ZERO; ELEMENTS]);
    f32_to_bf16(&noise(1e-4), &mut grad);
    let mut log = vec![0; log_bytes(ELEMENTS)];
    let mut group = c.benchmark_group("adamw in bf16");
    group
        .throughput(Throughput::Bytes(28 * ELEMENTS as u64))
        .sample_size(10);
    for keeps in [false, true] {
        let name = if keeps {
            "ahead of the norm"
        } else {
            "after it"
        };
        group.bench_function(name, |b| {
            b.iter(|| {
                let states = States {
                    master: &mut master,
                    m: &mut m,
                    v: &mut v,
                };
                let exchange = Exchange::Bf16 {
                    grad: &grad,
                    param: &mut param,
                };
                let kept = Kept {
                    log: &mut log,
                    grad: &mut [],
                };
                let (isa, s) = (Isa::best(), ADAM.at(100, 1e-4, 1.0));
                if keeps {
                    let left = adamw_ahead(&workers, isa, &s, states, exchange, kept);
                    assert_eq!(left, 0);
                } else {
                    adamw_parallel(&workers, isa, &s, states, exchange);
                }
            });
        });
    }
    group.finish();
}

/// f32 gradient in, f32 parameter over it, fp32 states: 32 bytes an element, read and written.
fn adam(c: &mut Criterion) {
    let workers = Workers::new(threads(), "bench").expect("threads");
    let mut arrays = [(); 4].map(|()| vec![0.5f32; ELEMENTS]);
    let mut group = c.benchmark_group("adamw");
    group
        .throughput(Throughput::Bytes(32 * ELEMENTS as u64))
        .sample_size(10);
    for isa in Isa::available() {
        let [master, m, v, both] = &mut arrays;
        group.bench_function(BenchmarkId::from_parameter(format!("{isa:?}")), |b| {
            b.iter(|| {
                let states = States {
                    master: &mut *master,
                    m: &mut *m,
                    v: &mut *v,
                };
                let exchange = Exchange::InPlaceF32(&mut *both);
                adamw_parallel(&workers, isa, &ADAM.at(1, 1e-3, 1.0), states, exchange);
            });
        });
    }
    // The ceiling: the same four arrays read and written, with next to no arithmetic.
    group.bench_function("bare pass", |b| {
        b.iter(|| {
            std::thread::scope(|scope| {
                let share = ELEMENTS / threads();
                let [a, b, c, d] = &mut arrays;
                let parts = a.chunks_mut(share).zip(b.chunks_mut(share));
                let others = c.chunks_mut(share).zip(d.chunks_mut(share));
                for ((a, b), (c, d)) in parts.zip(others) {
                    scope.spawn(move || {
                        for (((a, b), c), d) in a.iter_mut().zip(b).zip(c).zip(d) {
                            (*a, *b, *c, *d) = (*b, *c, *d, *a);
                        }
                    });
                }
            });
        });
    });
    group.finish();
}

fn linear(c: &mut Criterion) {
    let (t, n, k) = (1024, 768, 256);
    let (x, w) = (vec![0.5f32; t * k], vec![0.25f32; n * k]);
    let mut y = vec![0.0f32; t * n];
    let mut group = c.benchmark_group("linear 1024x768x256");
    group.throughput(Throughput::Elements(2 * (t * n * k) as u64));
    for threads in [1, threads()] {
        let workers = Workers::new(threads, "bench").expect("threads");
        group.bench_function(BenchmarkId::new("ours", threads), |b| {
            b.iter(|| ops::linear(&workers, (t, n, k), &x, &w, black_box(&mut y)));
        });
    }
    group.finish();
}

criterion_group!(cpu, ahead, adam, linear);
criterion_main!(cpu);
