//! Every optimizer and format of states, with the bits of the CPU's.

use forebay_kernels::cpu::{
    self, Exchange, Isa, Master, Moment, Optimizer, Scalars, StateFormat, round_to_bf16,
    round_to_f16,
};
use forebay_kernels::cuda::Element;
use forebay_kernels::cuda::ops::{self, StatesAt};
use half::{bf16, f16};

use super::gpu::{Buffer, Trial, floats, on_a_gpu};

/// A tensor of its own elements in a part of others; enough of them that sums take several strands.
const PART: usize = 120_064;
const RUN: std::ops::Range<usize> = 64..120_001;

#[test]
fn every_optimizer_has_the_bits_of_the_cpu_in_every_format() {
    on_a_gpu(|t| {
        for name in ["adamw", "sgd", "lion", "adagrad", "lamb"] {
            let optimizer: Optimizer = name.parse().unwrap();
            for (master, moment) in [
                (Master::F32, Moment::F32),
                (Master::F32, Moment::Bf16),
                (Master::Split, Moment::F32),
                (Master::Split, Moment::Bf16),
            ] {
                if master == Master::Split && t.element != Element::Bf16 {
                    continue;
                }
                let moments = optimizer.moments();
                let format = StateFormat {
                    master,
                    moment,
                    moments,
                };
                three_steps(t, &optimizer, format);
            }
        }
    });
}

fn three_steps(t: &mut Trial<'_>, optimizer: &Optimizer, format: StateFormat) {
    let masters = t.values(PART, 1.0).exact;
    let mut states = vec![0u32; format.bytes() as usize * PART / 4];
    format.fill(bytemuck::cast_slice_mut(&mut states), &masters);
    let (there, sums) = (Buffer::of(&states), Buffer::new(ops::LAMB_SUMS));
    let mut wide = masters[RUN].to_vec();
    let mut narrow: Vec<bf16> = wide.iter().map(|x| round_to_bf16(*x)).collect();
    let mut half: Vec<f16> = wide.iter().map(|x| round_to_f16(*x)).collect();
    let param = match t.element {
        Element::Bf16 => Buffer::of(&narrow),
        Element::F16 => Buffer::of(&half),
        Element::F32 => Buffer::of(&wide),
    };
    let at = StatesAt {
        format,
        address: there.address,
        elements: PART as u64,
        first: RUN.start as u64,
    };
    for step in 0..4 {
        // A step that changes nothing at the end.
        let scalars = match step {
            3 => Scalars::Unchanged,
            _ => optimizer.at(step + 1, 1e-3, 0.7),
        };
        let grad = t.values(RUN.len(), 1.0);
        let (grad_there, n) = (grad.on_device(), RUN.len());
        let from = (grad_there.address, t.element);
        let (q, to) = (t.queue(), param.address);
        unsafe { ops::update(q, &scalars, from, at, to, n, sums.address).unwrap() };
        let grads: Vec<bf16> = grad.exact.iter().map(|x| bf16::from_f32(*x)).collect();
        let halves: Vec<f16> = grad.exact.iter().map(|x| f16::from_f32(*x)).collect();
        let exchange = match t.element {
            Element::Bf16 => Exchange::Bf16 {
                grad: &grads,
                param: &mut narrow,
            },
            Element::F16 => Exchange::F16 {
                grad: &halves,
                param: &mut half,
            },
            Element::F32 => Exchange::F32 {
                grad: &grad.exact,
                param: &mut wide,
            },
        };
        let stored = format.view(bytemuck::cast_slice_mut(&mut states), PART, RUN);
        cpu::update(&t.workers, Isa::best(), &scalars, stored, exchange);
        // What is enqueued reads the gradient: it is there until then.
        let what = format!("{} {format:?} step {step}", optimizer.name());
        assert!(there.get::<u32>() == states, "{what}: states");
    }
    let wanted: Vec<f32> = match t.element {
        Element::Bf16 => narrow.iter().map(|x| x.to_f32()).collect(),
        Element::F16 => half.iter().map(|x| x.to_f32()).collect(),
        Element::F32 => wide,
    };
    let got = floats(t.element, &param);
    let same = got
        .iter()
        .zip(&wanted)
        .all(|(a, b)| a.to_bits() == b.to_bits());
    assert!(
        same && got.len() == wanted.len(),
        "{}: parameters",
        optimizer.name()
    );
}
