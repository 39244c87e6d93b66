//! The operations on a CUDA device against those of the CPU (which answer to an f64 oracle), on fresh
//! random data, in f32, bf16 and f16. Without a GPU nothing is tried, and that is said;
//! `FOREBAY_REQUIRE_GPU=1` makes it a failure.
//!
//! Every unsafe block queues an operation or moves bytes between buffers of the test that are as long as
//! their values, in order on one stream.
#![allow(clippy::unwrap_used, clippy::undocumented_unsafe_blocks)]

mod attention;
mod gpu;
mod held;
mod optimizers;

use forebay_kernels::cpu::{self, AdamW, Exchange, Isa, NormIn, States, ops as host};
use forebay_kernels::cuda::ops::{self, Queue};
use forebay_kernels::cuda::{Element, sys};
use gpu::{Buffer, Mapped, floats, on_a_gpu};
use half::{bf16, f16};
use rand::Rng;

#[test]
fn elementwise_operations_agree() {
    on_a_gpu(|t| {
        for n in [1, 7, 1000, 4097, 100_003] {
            let (a, b, d) = (t.values(n, 4.0), t.values(n, 4.0), t.values(n, 1.0));
            let (da, db, dd, out, up) = (
                a.on_device(),
                b.on_device(),
                d.on_device(),
                t.room(n),
                t.room(n),
            );
            let (mut wanted, mut other) = (vec![0.0; n], vec![0.0; n]);
            unsafe { ops::add(t.queue(), da.address, db.address, out.address, n).unwrap() };
            host::add(&t.workers, &a.exact, &b.exact, &mut wanted);
            t.close("add", &floats(t.element, &out), &wanted);
            unsafe { ops::swiglu(t.queue(), da.address, db.address, out.address, n).unwrap() };
            host::swiglu(&t.workers, &a.exact, &b.exact, &mut wanted);
            t.close("swiglu", &floats(t.element, &out), &wanted);
            let from = [da.address, db.address, dd.address];
            let to = [out.address, up.address];
            unsafe { ops::swiglu_backward(t.queue(), from, to, n).unwrap() };
            host::swiglu_backward(
                &t.workers,
                &a.exact,
                &b.exact,
                &d.exact,
                &mut wanted,
                &mut other,
            );
            t.close("swiglu dgate", &floats(t.element, &out), &wanted);
            t.close("swiglu dup", &floats(t.element, &up), &other);
        }
    });
}

#[test]
fn norms_agree() {
    on_a_gpu(|t| {
        for (rows, cols) in [
            (1, 1),
            (5, 24),
            (300, 128),
            (77, 576),
            (130, 2048),
            (3, 5120),
        ] {
            let n = rows * cols;
            let (x, w, dy) = (t.values(n, 2.0), t.values(cols, 1.5), t.values(n, 1.0));
            let base = t.values(n, 1.0);
            let (dx0, dw0) = (base.on_device(), vec![0.25f32; cols]);
            let (xd, wd, dyd, y) = (x.on_device(), w.on_device(), dy.on_device(), t.room(n));
            let mut wanted = vec![0.0; n];
            let size = (rows, cols);
            unsafe {
                ops::rms_norm(t.queue(), size, xd.address, wd.address, 1e-5, y.address).unwrap();
            }
            host::rms_norm(&t.workers, cols, &x.exact, &w.exact, 1e-5, &mut wanted);
            t.close("rms_norm", &floats(t.element, &y), &wanted);
            let (mut dx, mut dw) = (base.exact.clone(), dw0.clone());
            let mut scratch = vec![0.0; host::rms_norm_backward_scratch(cols)];
            host::rms_norm_backward(
                &t.workers,
                cols,
                &x.exact,
                &w.exact,
                1e-5,
                &dy.exact,
                &mut dx,
                true,
                &mut dw,
                &mut scratch,
            );
            let (dwd, room) = (
                Buffer::of(&dw0),
                Buffer::new(ops::rms_norm_backward_scratch(cols)),
            );
            let from = [xd.address, wd.address, dyd.address];
            let (to, dwa) = (dx0.address, dwd.address);
            unsafe {
                ops::rms_norm_backward(t.queue(), size, from, 1e-5, to, true, dwa, room.address)
                    .unwrap();
            }
            t.close("rms_norm dx", &floats(t.element, &dx0), &dx);
            t.within("rms_norm dweight", &dwd.get::<f32>(), &dw, 1e-5);
        }
    });
}

#[test]
fn rotations_and_embeddings_agree() {
    on_a_gpu(|t| {
        for (batch, seq, heads, head_dim) in [(1, 1, 1, 2), (3, 17, 5, 24), (2, 300, 4, 128)] {
            let n = batch * seq * heads * head_dim;
            let x = t.values(n, 2.0);
            let dims = host::RopeDims {
                seq,
                heads,
                head_dim,
                theta: 1e4,
            };
            for way in [host::Direction::Forward, host::Direction::Backward] {
                let (device, mut wanted) = (x.on_device(), x.exact.clone());
                unsafe { ops::rope(t.queue(), dims, device.address, batch * seq, way).unwrap() };
                host::rope(&t.workers, dims, &mut wanted, way);
                t.close("rope", &floats(t.element, &device), &wanted);
            }
        }
        for (vocabulary, cols, tokens) in [(3, 7, 5), (1000, 64, 700), (50, 2048, 999)] {
            let ids: Vec<u32> = (0..tokens)
                .map(|_| t.random.random_range(0..vocabulary as u32))
                .collect();
            let (table, dout) = (
                t.values(vocabulary * cols, 1.0),
                t.values(tokens * cols, 1.0),
            );
            let (idd, td, out) = (Buffer::of(&ids), table.on_device(), t.room(tokens * cols));
            let mut wanted = vec![0.0; tokens * cols];
            let size = (vocabulary, cols);
            unsafe {
                ops::embedding(
                    t.queue(),
                    size,
                    idd.address,
                    tokens,
                    td.address,
                    out.address,
                )
                .unwrap();
            }
            host::embedding(&t.workers, cols, &ids, &table.exact, &mut wanted).unwrap();
            assert_eq!(floats(t.element, &out), wanted, "rows are copied");
            let (host, out) = (Mapped::of(&td), t.room(tokens * cols));
            let (from, to) = (host.address, out.address);
            unsafe { ops::embedding(t.queue(), size, idd.address, tokens, from, to).unwrap() };
            assert_eq!(floats(t.element, &out), wanted, "rows of the host's memory");
            let mut grad = vec![0.5f32; vocabulary * cols];
            let (gd, dd) = (Buffer::of(&grad), dout.on_device());
            let room = Buffer::new(ops::embedding_backward_scratch(tokens));
            let (from, to) = (dd.address, gd.address);
            unsafe {
                let q = t.queue();
                ops::embedding_backward(q, size, idd.address, tokens, from, to, room.address)
                    .unwrap();
            }
            host::embedding_backward(&t.workers, cols, &ids, &dout.exact, &mut grad).unwrap();
            t.within("embedding dtable", &gd.get::<f32>(), &grad, 1e-6);
        }
    });
}

#[test]
fn products_agree() {
    on_a_gpu(|t| {
        for dims in [
            (1, 1, 1),
            (13, 7, 5),
            (64, 96, 33),
            (500, 257, 384),
            (128, 1000, 512),
        ] {
            let (rows, n, k) = dims;
            let (x, w, dy) = (
                t.values(rows * k, 1.0),
                t.values(n * k, 1.0),
                t.values(rows * n, 1.0),
            );
            let base = t.values(rows * k, 1.0);
            let (xd, wd, dyd) = (x.on_device(), w.on_device(), dy.on_device());
            let (y, dx) = (t.room(rows * n), base.on_device());
            let room = Buffer::new(ops::linear_scratch(dims));
            let mut wanted = vec![0.0; rows * n];
            let q = t.queue();
            unsafe {
                ops::linear(q, dims, xd.address, wd.address, y.address, room.address).unwrap();
            }
            host::linear(&t.workers, dims, &x.exact, &w.exact, &mut wanted);
            t.close("linear", &floats(t.element, &y), &wanted);
            let mut wanted = base.exact.clone();
            let all = [dyd.address, wd.address, dx.address];
            unsafe { ops::linear_dx(q, dims, all, true, room.address).unwrap() };
            host::linear_dx(&t.workers, dims, &dy.exact, &w.exact, &mut wanted, true);
            t.close("linear dx", &floats(t.element, &dx), &wanted);
            let mut wanted = vec![1.0f32; n * k];
            let dw = Buffer::of(&wanted);
            let all = [xd.address, dyd.address, dw.address];
            unsafe { ops::linear_dw(q, dims, all, true, room.address).unwrap() };
            host::linear_dw(&t.workers, dims, &x.exact, &dy.exact, &mut wanted);
            t.within("linear dw", &dw.get::<f32>(), &wanted, 1e-5);
            // Set, over anything.
            let dw = Buffer::of(&vec![f32::NAN; n * k]);
            let all = [xd.address, dyd.address, dw.address];
            unsafe { ops::linear_dw(q, dims, all, false, room.address).unwrap() };
            wanted.fill(0.0);
            host::linear_dw(&t.workers, dims, &x.exact, &dy.exact, &mut wanted);
            t.within("linear dw, set", &dw.get::<f32>(), &wanted, 1e-5);
        }
    });
}

#[test]
fn the_classifier_agrees() {
    on_a_gpu(|t| {
        for (tokens, hidden, vocabulary) in
            [(1, 8, 3), (37, 24, 101), (300, 128, 1003), (1100, 8, 50304)]
        {
            let dims = host::ClassifierDims {
                tokens,
                hidden,
                vocabulary,
            };
            let (x, w) = (
                t.values(tokens * hidden, 1.0),
                t.values(vocabulary * hidden, 1.0),
            );
            let targets: Vec<u32> = (0..tokens)
                .map(|i| match i % 5 {
                    3 => host::IGNORED,
                    _ => t.random.random_range(0..vocabulary as u32),
                })
                .collect();
            let scale = 1.0 / tokens as f32;
            // In f16 most gradients of logits are nothing without it.
            let loss_scale = if t.element == Element::F16 {
                8192.0
            } else {
                1.0
            };
            let (mut loss, mut dx) = (0.0, vec![0.0; tokens * hidden]);
            let mut dw = vec![0.125f32; vocabulary * hidden];
            let (dwd, dxd) = (Buffer::of(&dw), t.room(tokens * hidden));
            let threads = t.workers.threads();
            let mut scratch = vec![0.0; host::cross_entropy_scratch(dims, threads)];
            let grads = host::ClassifierGrads {
                dx: &mut dx,
                dweight: &mut dw,
                scale: loss_scale,
            };
            host::cross_entropy(
                &t.workers,
                dims,
                &x.exact,
                &w.exact,
                &targets,
                scale,
                &mut loss,
                Some(grads),
                &mut scratch,
            )
            .unwrap();
            let (xd, wd, td) = (x.on_device(), w.on_device(), Buffer::of(&targets));
            let (ld, room) = (
                Buffer::new(4),
                Buffer::new(ops::cross_entropy_scratch(t.element, dims)),
            );
            let from = [xd.address, wd.address, td.address];
            let grads = [dxd.address, dwd.address];
            let to = Some(ops::ClassifierGrads {
                grads,
                add: true,
                scale: loss_scale,
            });
            unsafe {
                ops::cross_entropy(t.queue(), dims, from, scale, ld.address, to, room.address)
                    .unwrap();
            }
            t.within("loss", &ld.get::<f32>(), &[loss], 1e-5);
            t.close("classifier dx", &floats(t.element, &dxd), &dx);
            t.within(
                "classifier dweight",
                &dwd.get::<f32>(),
                &dw,
                match t.element {
                    Element::F32 => 1e-5,
                    Element::Bf16 => 4e-3,
                    Element::F16 => 1e-3,
                },
            );
        }
    });
}

/// What three updates left; parameters as they lie in memory.
struct Updated {
    master: Vec<f32>,
    m: Vec<f32>,
    v: Vec<f32>,
    param: Vec<u8>,
}

/// Of a gradient in the type `from`, into a parameter in the type under test.
fn updated_on_device(
    t: &gpu::Trial<'_>,
    (grad, from): (&[f32], Element),
    master: &[f32],
    at: impl Fn(u64) -> cpu::AdamScalars,
) -> Updated {
    let (n, zeros) = (master.len(), vec![0.0f32; master.len()]);
    let [master, m, v] = [master, &zeros, &zeros].map(Buffer::of);
    let grad = gpu::Values {
        element: from,
        exact: grad.to_vec(),
    };
    let (grad, param) = (grad.on_device(), t.room(n));
    let states = [master.address, m.address, v.address];
    for step in 1..=3 {
        let (grad, to) = ((grad.address, from), param.address);
        unsafe { ops::adamw(t.queue(), &at(step), grad, states, to, n).unwrap() };
    }
    Updated {
        master: master.get(),
        m: m.get(),
        v: v.get(),
        param: param.get(),
    }
}

/// The same on the CPU.
fn updated_on_host(
    t: &gpu::Trial<'_>,
    (grad, from): (&[f32], Element),
    master: &[f32],
    at: impl Fn(u64) -> cpu::AdamScalars,
) -> Updated {
    let (mut master, mut m) = (master.to_vec(), vec![0.0f32; master.len()]);
    let (mut v, mut wide) = (m.clone(), m.clone());
    let low_grad: Vec<bf16> = grad.iter().map(|x| cpu::round_to_bf16(*x)).collect();
    let half_grad: Vec<f16> = grad.iter().map(|x| cpu::round_to_f16(*x)).collect();
    let (mut low, mut half) = (low_grad.clone(), half_grad.clone());
    for step in 1..=3 {
        let states = States {
            master: &mut master,
            m: &mut m,
            v: &mut v,
        };
        let (wide, low, half) = (&mut wide, &mut low, &mut half);
        let (low_grad, half_grad) = (&low_grad, &half_grad);
        let exchange = match (from, t.element) {
            (Element::F32, Element::F32) => Exchange::F32 { grad, param: wide },
            (Element::F32, Element::Bf16) => Exchange::F32ToBf16 { grad, param: low },
            (Element::F32, Element::F16) => Exchange::F32ToF16 { grad, param: half },
            (Element::Bf16, _) => Exchange::Bf16 {
                grad: low_grad,
                param: low,
            },
            (Element::F16, _) => Exchange::F16 {
                grad: half_grad,
                param: half,
            },
        };
        cpu::adamw_parallel(&t.workers, Isa::best(), &at(step), states, exchange);
    }
    let param = match t.element {
        Element::F32 => wide.iter().flat_map(|x| x.to_le_bytes()).collect(),
        Element::Bf16 => low.iter().flat_map(|x| x.to_le_bytes()).collect(),
        Element::F16 => half.iter().flat_map(|x| x.to_le_bytes()).collect(),
    };
    Updated {
        master,
        m,
        v,
        param,
    }
}

#[test]
fn adamw_and_the_square_sum_have_the_bits_of_the_cpu() {
    on_a_gpu(|t| {
        let n: usize =
            std::env::var("FOREBAY_ADAM_ELEMENTS").map_or(3_000_001, |text| text.parse().unwrap());
        // All kinds of bits: ties of the rounding and subnormals among them.
        let mut any = |i: usize| match i % 9 {
            0 => f32::from_bits(t.random.random::<u32>() & 0x807f_ffff),
            1 => f32::from_bits((t.random.random::<u32>() & 0x3fff_0000) | 0x8000),
            2 => 0.0,
            3 => f32::from_bits((t.random.random::<u32>() & 0x3fff_e000) | 0x1000),
            4 => t.random.random_range(-1e-7..1e-7),
            _ => t.random.random_range(-1.0..1.0),
        };
        let grad: Vec<f32> = (0..n).map(&mut any).collect();
        let master: Vec<f32> = (0..n).map(&mut any).collect();
        let adam = AdamW {
            weight_decay: 0.1,
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
        };
        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        let mut kinds = vec![Element::F32, t.element];
        kinds.dedup();
        for from in kinds {
            let at = |step| adam.at(step, 1e-3, 0.7);
            let device = updated_on_device(t, (&grad, from), &master, at);
            let host = updated_on_host(t, (&grad, from), &master, at);
            let what = format!("{from:?} to {:?}", t.element);
            for (name, got, wanted) in [
                ("master", &device.master, &host.master),
                ("m", &device.m, &host.m),
                ("v", &device.v, &host.v),
            ] {
                assert!(bits(got) == bits(wanted), "{what}: {name} differs");
            }
            assert!(device.param == host.param, "{what}: parameters differ");
            println!("{n} elements, 3 steps, {what}: equal bits");
            let few = n.min(1_000_003);
            let values = gpu::Values {
                element: from,
                exact: grad[..few].to_vec(),
            };
            let (sums, values) = (Buffer::new(ops::SQUARE_SUMS), values.on_device());
            let q = Queue {
                element: from,
                ..t.queue()
            };
            unsafe { ops::square_sum(q, values.address, few, sums.address).unwrap() };
            let got: f64 = sums.get::<f64>().iter().sum();
            let wide = floats(from, &values);
            let wanted = cpu::square_sum(&t.workers, NormIn::F32(&wide)).sum;
            assert_eq!(got.to_bits(), wanted.to_bits());
        }
    });
}

/// Every value of the narrow type, the middle between it and the next, and the nearest f32 on either side; NaN
/// and what is too large as well.
#[test]
fn casts_have_the_bits_of_the_cpu() {
    on_a_gpu(|t| {
        if t.element == Element::F32 {
            return;
        }
        let lower = [
            0u32, 1, 0xfff, 0x1000, 0x1001, 0x7fff, 0x8000, 0x8001, 0xf000,
        ];
        let upper = 0..=u32::from(u16::MAX);
        // In f16 halves stand at bit 12, in bf16 at bit 15; between them all of f16's last places.
        let all = upper.flat_map(|upper| {
            let places = (0..8).map(move |place| place << 13);
            let lower = lower
                .iter()
                .copied()
                .chain(places.flat_map(|p| [p | 0xfff, p | 0x1000, p | 0x1001]));
            lower.map(move |lower| f32::from_bits(upper << 16 | lower))
        });
        let all: Vec<f32> = all.collect();
        let (from, to) = (Buffer::of(&all), t.room(all.len()));
        unsafe {
            ops::cast(
                t.queue(),
                (from.address, Element::F32),
                to.address,
                all.len(),
            )
            .unwrap()
        };
        let (got, element) = (to.get::<u16>(), t.element);
        for (x, got) in all.iter().zip(&got) {
            let wanted = gpu::bits(element, *x);
            assert_eq!(*got, wanted, "{element:?} of {:08x}", x.to_bits());
        }
        // And back, exactly; of NaN only that it is one.
        let every: Vec<u16> = (0..=u16::MAX).collect();
        let (from, to) = (Buffer::of(&every), Buffer::new(4 * every.len()));
        let q = Queue {
            element: Element::F32,
            ..t.queue()
        };
        unsafe { ops::cast(q, (from.address, element), to.address, every.len()).unwrap() };
        for (bits, got) in every.iter().zip(to.get::<f32>()) {
            let wanted = match element {
                Element::F16 => f16::from_bits(*bits).to_f32(),
                _ => bf16::from_bits(*bits).to_f32(),
            };
            let same = got.to_bits() == wanted.to_bits() || got.is_nan() && wanted.is_nan();
            assert!(same, "{element:?} {bits:04x}: {got} for {wanted}");
        }
    });
}

#[test]
fn a_token_outside_the_vocabulary_sets_the_fault_word_and_nothing_else() {
    on_a_gpu(|t| {
        let table = t.values(10 * 8, 1.0);
        let (ids, table) = (Buffer::of(&[3u32, 12, 4]), table.on_device());
        let out = t.room(3 * 8);
        unsafe {
            let q = t.queue();
            ops::embedding(q, (10, 8), ids.address, 3, table.address, out.address).unwrap();
        }
        let rows = floats(t.element, &out);
        assert_eq!(t.gpu.fault.get::<u32>()[0], 2);
        assert!(rows[8..16].iter().all(|x| x.is_nan()) && !rows[0].is_nan());
        let zero = [0u32; 4];
        unsafe { sys::cuMemcpyHtoD_v2(t.gpu.fault.address, zero.as_ptr().cast(), 16) };
    });
}
