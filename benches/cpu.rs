//! The CPU kernels beside their ceilings: AdamW against a bare pass over as much memory, the linear
//! layer against a bare call of the matrix product.
//!
//! Goals: ratios on the machine at hand, and benchmarks that still run. Not: absolute figures to
//! compare between machines.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use forebay_kernels::cpu::{
    AdamW, Exchange, Isa, Kept, States, Workers, adamw_ahead, adamw_parallel, log_bytes, ops,
};

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
    // The same with a log of what is overwritten: 3 to 4 bytes more, and the gradient's 4.
    let mut room = (vec![0; log_bytes(ELEMENTS)], vec![0; 4 * ELEMENTS]);
    let [master, m, v, both] = &mut arrays;
    group.bench_function("ahead of the norm", |b| {
        b.iter(|| {
            let states = States {
                master: &mut *master,
                m: &mut *m,
                v: &mut *v,
            };
            let kept = Kept {
                log: &mut room.0,
                grad: &mut room.1,
            };
            let (exchange, s) = (Exchange::InPlaceF32(&mut *both), ADAM.at(1, 1e-3, 1.0));
            adamw_ahead(&workers, Isa::best(), &s, states, exchange, kept)
        });
    });
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

criterion_group!(cpu, adam, linear);
criterion_main!(cpu);
