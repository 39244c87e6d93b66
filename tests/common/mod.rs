//! A tiny decoder and runs of it, for tests of the whole path.
#![allow(dead_code)]

use std::path::Path;

use forebay::nvme::sim::SimDisk;
use forebay::nvme::{self, Store};
use forebay::{
    Ahead, Args, CudaArgs, CudaContext, DType, HostArgs, HostContext, Operation, Options, Policy,
    RandomInit, Result, Trainer,
};
use forebay_decoder::{Batch, Config, Decoder, Family};

pub(crate) const BATCH: usize = 2;
pub(crate) const SEQ: usize = 24;

/// Four layers, grouped heads, an odd vocabulary; optimizer states in several parts.
pub(crate) fn config() -> Config {
    Config {
        family: Family::Qwen3,
        hidden: 32,
        intermediate: 80,
        layers: 4,
        heads: 4,
        kv_heads: 2,
        head_dim: 8,
        vocabulary: 61,
        eps: 1e-6,
        theta: 10_000.0,
        tied: false,
        init: 0.1,
    }
}

pub(crate) fn decoder() -> Decoder {
    decoder_in(DType::F32)
}

pub(crate) fn decoder_in(dtype: DType) -> Decoder {
    Decoder::compute_in(dtype, config(), BATCH, SEQ).unwrap()
}

/// Options under which all three tiers have work.
pub(crate) fn options(folder: &Path) -> Options {
    let mut options = Options::new([folder.to_owned()]);
    options.threads = 1;
    options.optimizer_chunk = Some(4096);
    options
}

/// Gives options the budgets that a placement calls for: for `Auto` half of what is between the
/// least and all.
pub(crate) fn with_budgets(mut options: Options, decoder: &Decoder) -> Options {
    let footprint = decoder.footprint(options.target().unwrap()).unwrap();
    let needs = |policy| {
        let options = Options {
            placement: policy,
            ..options.clone()
        };
        forebay::requirements(decoder.model(), footprint, &options).unwrap()
    };
    let (most, least) = (needs(Policy::Resident), needs(Policy::Disk));
    let all = needs(Policy::Pinned);
    match options.placement {
        Policy::Resident => {
            options.device_budget = Some(most.device_bytes);
            options.pinned_budget = Some(most.pinned_bytes);
        }
        Policy::Pinned => {
            options.device_budget = Some(least.device_bytes);
            // With fewer slots than the whole device would give, more lives in pinned memory.
            options.pinned_budget = Some(2 * all.pinned_bytes);
        }
        Policy::Auto => {
            options.device_budget = Some(least.device_bytes);
            options.pinned_budget = Some((least.pinned_bytes + all.pinned_bytes) / 2);
        }
        Policy::Disk => {
            options.device_budget = Some(least.device_bytes);
            options.pinned_budget = Some(least.pinned_bytes);
        }
    }
    options
}

/// Options under which this many thirds of the optimizer states find room on the device, and under Auto
/// half of the rest in pinned memory.
pub(crate) fn split(options: Options, decoder: &Decoder, thirds: u64) -> Options {
    let all = Options {
        placement: Policy::Resident,
        ..options.clone()
    };
    let all = with_budgets(all, decoder).device_budget.unwrap();
    let states = 12 * decoder.model().elements();
    let mut options = options;
    options.device_budget = Some(all - states * (3 - thirds) / 3);
    let ahead = options.ahead;
    if options.placement == Policy::Auto {
        // All that is in pinned memory is states.
        options.ahead = Ahead::Never;
    }
    let footprint = decoder.footprint(options.target().unwrap()).unwrap();
    let needs = forebay::requirements(decoder.model(), footprint, &options).unwrap();
    options.pinned_budget = Some(needs.pinned_bytes);
    if options.placement == Policy::Auto {
        let rest = states * (3 - thirds) / 3;
        options.pinned_budget = Some(needs.pinned_bytes - rest / 2);
    }
    options.ahead = ahead;
    options
}

/// The batch of a step: any function of the step will do.
pub(crate) fn tokens(step: u64) -> (Vec<u32>, Vec<u32>) {
    let token = |i: u64| ((i * i + 7 * i + step * 31 + (i * step) % 13) % 61) as u32;
    let ids: Vec<u32> = (0..(BATCH * SEQ) as u64).map(token).collect();
    let targets = (1..=(BATCH * SEQ) as u64).map(token).collect();
    (ids, targets)
}

pub(crate) fn create(decoder: &Decoder, options: &Options) -> Trainer {
    let footprint = decoder.footprint(options.target().unwrap()).unwrap();
    let model = decoder.model().clone();
    Trainer::create(model, footprint, options, &mut RandomInit { seed: 5 }).unwrap()
}

pub(crate) fn resume(decoder: &Decoder, options: &Options) -> Trainer {
    let footprint = decoder.footprint(options.target().unwrap()).unwrap();
    Trainer::resume(decoder.model().clone(), footprint, options).unwrap()
}

/// Goes on from what is on the disk that the options name, or begins there.
pub(crate) fn go_on(decoder: &Decoder, options: &Options, disk: &SimDisk) -> Result<Trainer> {
    let footprint = decoder.footprint(options.target()?)?;
    let model = decoder.model().clone();
    match Store::peek(&options.disk[0], disk) {
        Ok(_) => Trainer::resume(model, footprint, options),
        Err(nvme::Error::NoGeneration { .. }) => {
            Trainer::create(model, footprint, options, &mut RandomInit { seed: 5 })
        }
        Err(other) => Err(other.into()),
    }
}

/// One step; the bits of its loss.
pub(crate) fn step(trainer: &mut Trainer, decoder: &Decoder) -> u32 {
    try_step(trainer, decoder).unwrap()
}

pub(crate) fn try_step(trainer: &mut Trainer, decoder: &Decoder) -> Result<u32> {
    let (ids, targets) = tokens(trainer.steps());
    let step = trainer.begin(5e-3)?;
    let batch = Batch {
        ids: &ids,
        targets: &targets,
    };
    decoder.train_step(&step, &batch)?;
    Ok(step.finish()?.loss.unwrap().to_bits())
}

/// Bits of the losses of the next `steps` steps.
pub(crate) fn train(trainer: &mut Trainer, decoder: &Decoder, steps: u64) -> Vec<u32> {
    (0..steps).map(|_| step(trainer, decoder)).collect()
}

/// Adds its input to its output, on the host device. An operation of our own: the matrix product packs its
/// factors into memory that it allocates itself, and is not the runtime.
#[derive(Clone, Copy)]
pub(crate) struct Accumulate;

impl Operation for Accumulate {
    fn name(&self) -> &'static str {
        "accumulate"
    }

    fn host(&self, _: &HostContext, mut args: HostArgs<'_>) -> std::result::Result<(), String> {
        let (x, y) = (args.input::<f32>()?, args.output::<f32>()?);
        y.iter_mut().zip(x).for_each(|(y, x)| *y += x);
        Ok(())
    }
}

/// Makes the first number of a gradient infinite.
#[derive(Clone, Copy)]
pub(crate) struct Poison;
impl Operation for Poison {
    fn name(&self) -> &'static str {
        "poison"
    }
    fn host(&self, _: &HostContext, mut args: HostArgs<'_>) -> std::result::Result<(), String> {
        args.output::<f32>()?[0] = f32::INFINITY;
        Ok(())
    }
    fn cuda(
        &self,
        cx: &CudaContext<'_>,
        mut args: CudaArgs<'_>,
    ) -> std::result::Result<(), String> {
        const SOURCE: &str = r#"
            extern "C" __global__ void poison(float* x) { *x = INFINITY_F; }
        "#;
        let mut x = Args::new().with(args.output()?.address);
        let one = [1; 3];
        // SAFETY: as the kernel takes them.
        let done = unsafe {
            cx.kernels.source("poison", SOURCE).and_then(|()| {
                let name = ("poison", None);
                cx.kernels.launch(cx.stream, name, one, [1; 2], 0, &mut x)
            })
        };
        done.map_err(|error| error.to_string())
    }
}
