//! The operations on a CUDA device against those of the CPU (which answer to an f64 oracle), on fresh
//! random data, in f32 and in bf16. Without a GPU nothing is tried, and that is said;
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
use half::bf16;
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
            let (mut loss, mut dx) = (0.0, vec![0.0; tokens * hidden]);
            let mut dw = vec![0.125f32; vocabulary * hidden];
            let (dwd, dxd) = (Buffer::of(&dw), t.room(tokens * hidden));
            let threads = t.workers.threads();
            let mut scratch = vec![0.0; host::cross_entropy_scratch(dims, threads)];
            let grads = host::ClassifierGrads {
                dx: &mut dx,
                dweight: &mut dw,
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
            let to = Some(ops::ClassifierGrads { grads, add: true });
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
                if t.element == Element::F32 {
                    1e-5
                } else {
                    4e-3
                },
            );
        }
    });
}

#[test]
fn adamw_and_the_square_sum_have_the_bits_of_the_cpu() {
    on_a_gpu(|t| {
        let n: usize =
            std::env::var("FOREBAY_ADAM_ELEMENTS").map_or(3_000_001, |text| text.parse().unwrap());
        // All kinds of bits: ties of the rounding and subnormals among them.
        let mut any = |i: usize| match i % 7 {
            0 => f32::from_bits(t.random.random::<u32>() & 0x807f_ffff),
            1 => f32::from_bits((t.random.random::<u32>() & 0x3fff_0000) | 0x8000),
            2 => 0.0,
            _ => t.random.random_range(-1.0..1.0),
        };
        let grad: Vec<f32> = (0..n).map(&mut any).collect();
        let mut master: Vec<f32> = (0..n).map(&mut any).collect();
        let (mut m, mut v): (Vec<f32>, Vec<f32>) = (vec![0.0; n], vec![0.0; n]);
        let (md, ad, vd) = (Buffer::of(&master), Buffer::of(&m), Buffer::of(&v));
        let (gd, pd) = (Buffer::of(&grad), t.room(n));
        let adam = AdamW {
            weight_decay: 0.1,
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
        };
        let mut param = vec![bf16::ZERO; n];
        let mut wide = vec![0.0f32; n];
        for step in 1..=3 {
            let scalars = adam.at(step, 1e-3, 0.7);
            let states = [md.address, ad.address, vd.address];
            unsafe {
                let from = (gd.address, Element::F32);
                ops::adamw(t.queue(), &scalars, from, states, pd.address, n).unwrap();
            }
            let states = States {
                master: &mut master,
                m: &mut m,
                v: &mut v,
            };
            let exchange = match t.element {
                Element::F32 => Exchange::F32 {
                    grad: &grad,
                    param: &mut wide,
                },
                Element::Bf16 => Exchange::F32ToBf16 {
                    grad: &grad,
                    param: &mut param,
                },
            };
            cpu::adamw_parallel(&t.workers, Isa::best(), &scalars, states, exchange);
        }
        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        for (what, got, wanted) in [("master", &md, &master), ("m", &ad, &m), ("v", &vd, &v)] {
            assert!(bits(&got.get::<f32>()) == bits(wanted), "{what} differs");
        }
        match t.element {
            Element::F32 => assert!(bits(&pd.get::<f32>()) == bits(&wide), "parameters differ"),
            Element::Bf16 => {
                let wanted: Vec<u16> = param.iter().map(|x| x.to_bits()).collect();
                assert!(pd.get::<u16>() == wanted, "parameters differ");
            }
        }
        println!("{n} elements, 3 steps, to {:?}: equal bits", t.element);
        let (sums, q) = (
            Buffer::new(ops::SQUARE_SUMS),
            Queue {
                element: Element::F32,
                ..t.queue()
            },
        );
        let few = n.min(1_000_003);
        unsafe { ops::square_sum(q, gd.address, few, sums.address).unwrap() };
        let got: f64 = sums.get::<f64>().iter().sum();
        let wanted = cpu::square_sum(&t.workers, NormIn::F32(&grad[..few])).sum;
        assert_eq!(got.to_bits(), wanted.to_bits());
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
