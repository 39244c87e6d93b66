//! Attention, on plain cores and on tensor cores.

use forebay_kernels::cpu::ops as host;
use forebay_kernels::cuda::{Element, ops};

use super::gpu::{Buffer, floats, on_a_gpu};

/// Under a tool that watches every access the larger cases take minutes, and show nothing new.
fn short() -> bool {
    std::env::var_os("FOREBAY_SHORT").is_some()
}

#[test]
fn attention_agrees() {
    on_a_gpu(|t| {
        for (batch, seq, heads, kv_heads, head_dim) in [
            (1, 1, 1, 1, 8),
            (2, 33, 4, 2, 16),
            (1, 129, 6, 2, 64),
            (2, 200, 4, 4, 128),
            (1, 70, 2, 1, 256),
            // In bf16 and f16 these are for tensor cores: one row, a tile, its neighbours, groups, several swaths of heads.
            (1, 1, 1, 1, 64),
            (2, 1, 4, 2, 128),
            (2, 63, 2, 2, 64),
            (1, 64, 4, 1, 128),
            (3, 65, 4, 2, 64),
            (1, 129, 8, 2, 128),
            (1, 200, 8, 1, 64),
            (2, 190, 3, 3, 96),
            (1, 130, 4, 2, 32),
            (1, 65, 2, 1, 128),
            (1, 70, 2, 2, 96),
            (5, 150, 16, 8, 64),
            (1, 1024, 8, 4, 128),
            (2, 1024, 2, 1, 64),
        ] {
            let large = batch * seq * heads * head_dim > 20_000;
            if large && short() {
                continue;
            }
            let dims = host::AttentionDims {
                batch,
                seq,
                heads,
                kv_heads,
                head_dim,
            };
            let (rows, kv) = (
                batch * seq * heads * head_dim,
                batch * seq * kv_heads * head_dim,
            );
            let (q, k, v) = (t.values(rows, 2.0), t.values(kv, 2.0), t.values(kv, 2.0));
            let dout = t.values(rows, 1.0);
            let lses = batch * heads * seq;
            let (qd, kd, vd, od) = (q.on_device(), k.on_device(), v.on_device(), t.room(rows));
            let (lse, dod) = (Buffer::new(4 * lses), dout.on_device());
            let from = [qd.address, kd.address, vd.address];
            unsafe { ops::attention(t.queue(), dims, from, od.address, lse.address).unwrap() };
            let threads = t.workers.threads();
            let mut scratch = vec![0.0; host::attention_scratch(dims, threads)];
            let (mut out, mut lse_h) = (vec![0.0; rows], vec![0.0; lses]);
            host::attention(
                &t.workers,
                dims,
                &q.exact,
                &k.exact,
                &v.exact,
                &mut out,
                &mut lse_h,
                &mut scratch,
            );
            let name = format!("attention {seq} x {head_dim}");
            t.close(&name, &floats(t.element, &od), &out);
            t.within(&format!("{name} lse"), &lse.get::<f32>(), &lse_h, 1e-5);
            let (dq, dk, dv) = (t.room(rows), t.room(kv), t.room(kv));
            let room = Buffer::new(ops::attention_backward_scratch(dims));
            let rest = [od.address, lse.address, dod.address];
            let to = [dq.address, dk.address, dv.address];
            unsafe {
                ops::attention_backward(t.queue(), dims, from, rest, to, room.address).unwrap();
            }
            // From the device's own output, so that its rounding is not counted twice.
            let out = floats(t.element, &od);
            let (mut hq, mut hk, mut hv) = (vec![0.0; rows], vec![0.0; kv], vec![0.0; kv]);
            host::attention_backward(
                &t.workers,
                dims,
                (&q.exact, &k.exact, &v.exact),
                (&out, &lse_h, &dout.exact),
                &mut hq,
                &mut hk,
                &mut hv,
                &mut scratch,
            );
            for (what, got, wanted) in [("dq", &dq, &hq), ("dk", &dk, &hk), ("dv", &dv, &hv)] {
                let got = floats(t.element, got);
                // A gradient of nothing but rounding (one token) has no relative error.
                if wanted.iter().any(|x| x.abs() > 1e-4) {
                    let limit = match t.element {
                        Element::F32 => 1e-5,
                        Element::Bf16 => 6e-3,
                        Element::F16 => 1.5e-3,
                    };
                    t.within(&format!("{name} {what}"), &got, wanted, limit);
                }
            }
        }
    });
}

#[test]
fn attention_repeats_its_bits() {
    on_a_gpu(|t| {
        let large = [(4, 333, 8, 2, 128), (2, 512, 16, 16, 64)];
        let small = [(1, 100, 2, 1, 128), (1, 130, 2, 2, 64)];
        for (batch, seq, heads, kv_heads, head_dim) in if short() { small } else { large } {
            let dims = host::AttentionDims {
                batch,
                seq,
                heads,
                kv_heads,
                head_dim,
            };
            let tokens = batch * seq * head_dim;
            let (rows, kv, lses) = (tokens * heads, tokens * kv_heads, batch * heads * seq);
            let inputs = [rows, kv, kv, rows].map(|n| t.values(n, 2.0).on_device());
            let [q, k, v, dout] = &inputs;
            let mut before: Option<Vec<Vec<u8>>> = None;
            for _ in 0..4 {
                // Fresh memory, elsewhere and full of NaN.
                let results = [rows, rows, kv, kv].map(|n| t.room(n));
                let [out, dq, dk, dv] = &results;
                let lse = Buffer::new(4 * lses);
                let room = Buffer::new(ops::attention_backward_scratch(dims));
                let from = [q.address, k.address, v.address];
                let rest = [out.address, lse.address, dout.address];
                let to = [dq.address, dk.address, dv.address];
                unsafe {
                    ops::attention(t.queue(), dims, from, out.address, lse.address).unwrap();
                    ops::attention_backward(t.queue(), dims, from, rest, to, room.address).unwrap();
                }
                let mut bytes: Vec<Vec<u8>> = results.iter().map(Buffer::get).collect();
                bytes.push(lse.get());
                assert!(bytes.iter().flatten().any(|x| *x != 0));
                if let Some(before) = &before {
                    assert!(*before == bytes, "another run, other bits");
                }
                before = Some(bytes);
            }
        }
    });
}
