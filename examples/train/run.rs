//! The run: from flags to a trained model, a table and a sample.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use forebay::{
    Ahead, Budgets, Ceilings, Footprint, Options, Policy, Publish, RandomInit, Trainer, Updates,
    requirements,
};
use forebay_decoder::{Batch, Config, Decoder, Positions};
use rand::SeedableRng;
use rand::distr::{Distribution, weighted::WeightedIndex};
use rand_chacha::ChaCha8Rng;

use crate::args::{Args, CheckpointEvery, Recipe, When};
use crate::data::Data;
use crate::print::{Printer, Summary};

/// Losses whose mean is compared with the entropy of single bytes.
pub(crate) const LAST: usize = 10;
const SAMPLE_BYTES: usize = 240;
const SAMPLE_TIME: Duration = Duration::from_secs(10);
const HELD_OUT_BATCHES: usize = 8;

pub(crate) fn run(args: &Args) -> Result<()> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        // A second Ctrl-C ends the process at once: the generation on disk stands.
        signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(&stop))?;
        signal_hook::flag::register(signal, Arc::clone(&stop))?;
    }
    // A limit on file sizes is to be an error, not the end of the process.
    signal_hook::flag::register(signal_hook::consts::SIGXFSZ, Arc::default())?;
    let config = config(args)?;
    if config.vocabulary < 256 {
        bail!(
            "--config: vocab_size is {}; text is read as bytes and needs 256",
            config.vocabulary
        );
    }
    let when = args.when()?;
    if args.resume && when == When::Never {
        bail!(
            "--resume with --publish never would write over the generation that it resumes; use \
             --publish end, or resume a copy (forebay snapshot)"
        );
    }
    let disk = Disk::new(args)?;
    let stored = if args.resume {
        Some(stored_recipe(&disk)?)
    } else {
        None
    };
    let target = args.device.target(threads(args))?;
    let recipe = stored
        .unwrap_or_else(|| Recipe::new(args, target))
        .with(args)?;
    let data = Data::read(&data_paths(args), recipe.seq as usize)?;
    let (batch, seq) = (recipe.batch as usize, recipe.seq as usize);
    let decoder = Decoder::compute_in(recipe.dtype()?, config, batch, seq)?;
    let decoder = decoder
        .in_micro_batches(recipe.micro_batches as usize)
        .context("--micro-batches")?;
    let mut options = options(args, &recipe, &disk)?;
    let ceilings = Ceilings::measure(&options, decoder.model().dtype())?;
    let footprint = decoder.footprint(target)?;
    // Without them it is placed in the usual order.
    let rates = ceilings.rates(&options, decoder.model(), footprint);
    options.rates = rates.unwrap_or_default();
    let (decoder, footprint, options) = fit(decoder, args, &options)?;
    let model = decoder.model().clone();
    let mut trainer = if args.resume {
        Trainer::resume(model, footprint, &options)?
    } else {
        let text = serde_json::to_string(&recipe)?;
        let mut trainer = Trainer::create(
            model,
            footprint,
            &options,
            &mut RandomInit { seed: recipe.seed },
        )?;
        if options.publish == Publish::Often {
            trainer.publish(&text)?;
        }
        trainer
    };
    let printer = Printer::new(args.json, recipe.steps, trainer.steps());
    printer.start(&trainer, &decoder, &data, &options, args)?;
    let (losses, moved) = train(
        &mut trainer,
        &decoder,
        &data,
        &recipe,
        args,
        &printer,
        &stop,
    )?;
    finish(
        trainer, &decoder, &data, &recipe, args, &ceilings, &losses, moved, disk, &printer,
    )
}

fn config(args: &Args) -> Result<Config> {
    match (&args.config, &args.preset) {
        (Some(path), _) => Ok(Config::read(path)?),
        (None, Some(name)) => Config::preset(name).with_context(|| {
            let names: Vec<_> = Config::presets().collect();
            format!("--preset {name}: use one of {}", names.join(", "))
        }),
        (None, None) => Ok(Config::byte_level()),
    }
}

/// Threads of the host device and of the optimizer.
fn threads(args: &Args) -> usize {
    let all = || std::thread::available_parallelism().map_or(1, usize::from);
    args.threads.map_or_else(all, |threads| threads as usize)
}

/// The steps. Ends at the last one, at `--stop-after`, or when told to stop; always with a
/// generation.
fn train(
    trainer: &mut Trainer,
    decoder: &Decoder,
    data: &Data,
    recipe: &Recipe,
    args: &Args,
    printer: &Printer,
    stop: &AtomicBool,
) -> Result<(Vec<f32>, Moved)> {
    let text = serde_json::to_string(recipe)?;
    let last = match args.stop_after {
        Some(steps) => recipe.steps.min(trainer.steps() + steps),
        None => recipe.steps,
    };
    let mut losses = Vec::new();
    let mut moved = Moved::default();
    moved.start(trainer);
    let tokens = f64::from(recipe.batch) * f64::from(recipe.seq);
    let mut start = Instant::now();
    while trainer.steps() < last && !stop.load(Ordering::Relaxed) {
        let index = trainer.steps();
        let batch = data.batch(
            recipe.seed,
            index,
            recipe.batch as usize,
            recipe.seq as usize,
        );
        let step = trainer.begin(recipe.learning_rate(index))?;
        decoder.train_step(
            &step,
            &Batch {
                ids: &batch.ids,
                targets: &batch.targets,
            },
        )?;
        let finished = step.finish()?;
        let loss = finished.loss.context("the step reported no loss")?;
        losses.push(loss);
        let seconds = start.elapsed().as_secs_f64();
        start = Instant::now();
        printer.step(finished.step, loss, tokens / seconds, seconds, trainer);
        if let When::Every(steps) = args.when()?
            && trainer.steps().is_multiple_of(steps)
            && trainer.steps() < last
        {
            moved.stop(trainer)?;
            trainer.publish(&text)?;
            moved.start(trainer);
            start = Instant::now();
        }
    }
    moved.stop(trainer)?;
    if args.when()? != When::Never {
        trainer.publish(&text)?;
    }
    printer.end();
    Ok((losses, moved))
}

/// Bytes that steps read from disk and wrote, those of generations left out.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Moved {
    /// Of states: what was asked for.
    pub(crate) payload: u64,
    /// As the kernel counts this process's I/O.
    pub(crate) kernel: u64,
    since: (u64, u64),
}

impl Moved {
    fn now(trainer: &Trainer) -> (u64, u64) {
        let stats = trainer.report().disk_stats;
        // Without it (another system, a sandbox) the kernel's count is 0.
        let text = std::fs::read_to_string("/proc/self/io").unwrap_or_default();
        let count = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|n| n.trim().parse::<u64>().ok()).unwrap_or(0)
        };
        (
            stats.payload_read_bytes + stats.payload_written_bytes,
            count("read_bytes:") + count("write_bytes:"),
        )
    }

    fn start(&mut self, trainer: &Trainer) {
        self.since = Self::now(trainer);
    }

    fn stop(&mut self, trainer: &mut Trainer) -> Result<()> {
        trainer.settle()?;
        let now = Self::now(trainer);
        self.payload += now.0 - self.since.0;
        self.kernel += now.1 - self.since.1;
        Ok(())
    }
}

#[expect(
    clippy::too_many_arguments,
    reason = "the end of a run looks at all of it"
)]
fn finish(
    mut trainer: Trainer,
    decoder: &Decoder,
    data: &Data,
    recipe: &Recipe,
    args: &Args,
    ceilings: &Ceilings,
    losses: &[f32],
    moved: Moved,
    disk: Disk,
    printer: &Printer,
) -> Result<()> {
    let report = trainer.report();
    let (batch, seq) = (recipe.batch as usize, recipe.seq as usize);
    let mut held_out = Vec::new();
    for tokens in data.held_out(batch, seq, HELD_OUT_BATCHES) {
        let step = trainer.eval()?;
        let batch = Batch {
            ids: &tokens.ids,
            targets: &tokens.targets,
        };
        held_out.push(f64::from(decoder.eval_loss(&step, &batch)?));
        step.finish()?;
    }
    let whole = trainer.steps() >= recipe.steps;
    let sample = if whole && !printer.json() {
        Some(sample(&mut trainer, decoder, data, recipe)?)
    } else {
        None
    };
    let tail = &losses[losses.len().saturating_sub(LAST)..];
    let mean = |values: &[f32]| {
        values.iter().map(|v| f64::from(*v)).sum::<f64>() / values.len().max(1) as f64
    };
    printer.summary(&Summary {
        report: &report,
        bound: report.bound(ceilings),
        ceilings,
        parameters: trainer.model().parameters(),
        dtype: trainer.model().dtype(),
        checkpoint_every: decoder.checkpoints_every(),
        steps_done: trainer.steps(),
        last_losses: mean(tail),
        unigram: data.unigram_entropy(),
        held_out: held_out.iter().sum::<f64>() / held_out.len().max(1) as f64,
        skipped: trainer.skipped(),
        loss_scale: trainer.loss_scale(),
        tbw: args.tbw,
        moved,
        steps_here: losses.len() as u64,
        sample,
    });
    let published = trainer.generation() > 0;
    drop(trainer);
    disk.end(whole, published, printer)
}

/// Continues the beginning of the held-out text, byte by byte.
fn sample(
    trainer: &mut Trainer,
    decoder: &Decoder,
    data: &Data,
    recipe: &Recipe,
) -> Result<String> {
    const TEMPERATURE: f32 = 0.7;
    let mut rng = ChaCha8Rng::seed_from_u64(recipe.seed);
    let prompt = data.prompt(recipe.seq as usize / 2);
    let mut text: Vec<u32> = prompt.iter().map(|b| u32::from(*b)).collect();
    let start = Instant::now();
    // Every byte is a whole forward pass: with a large model a shorter sample has to do.
    while text.len() < prompt.len() + SAMPLE_BYTES && start.elapsed() < SAMPLE_TIME {
        let window = &text[text.len().saturating_sub(recipe.seq as usize)..];
        let step = trainer.eval()?;
        let logits = decoder.logits(&step, window, window.len(), Positions::Last)?;
        step.finish()?;
        let logits = &logits[..256];
        let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weights = logits.iter().map(|l| ((l - highest) / TEMPERATURE).exp());
        text.push(
            WeightedIndex::new(weights)
                .context("sampling")?
                .sample(&mut rng) as u32,
        );
    }
    let bytes: Vec<u8> = text[prompt.len()..].iter().map(|b| *b as u8).collect();
    Ok(format!(
        "{}|{}",
        String::from_utf8_lossy(prompt),
        String::from_utf8_lossy(&bytes)
    ))
}

fn options(args: &Args, recipe: &Recipe, disk: &Disk) -> Result<Options> {
    let mut options = Options::new(disk.folders.iter().cloned());
    options.device = args.device;
    options.device_budget = args.gpu_budget.map(|b| b.0);
    options.pinned_budget = args.pinned_budget.map(|b| b.0);
    options.placement = args.placement;
    options.lookahead = args.lookahead;
    options.threads = threads(args);
    options.bind_threads = args.bind_threads;
    options.optimizer = recipe.optimizer()?;
    options.moments = recipe.moments()?;
    options.split_master = recipe.split_master;
    options.clip = (recipe.clip > 0.0).then_some(recipe.clip);
    options.loss_scale = recipe.loss_scale()?;
    options.publish = match args.when()? {
        When::Every(_) => Publish::Often,
        When::End => Publish::End,
        When::Never => Publish::Never,
    };
    options.ahead = args.ahead;
    if recipe.delayed_update {
        options.updates = Updates::Delayed;
    }
    options.trace = args.trace.clone();
    options.disk_throttle = args.disk_throttle.map(|b| b.0);
    Ok(options)
}

/// The decoder with as many layers a checkpoint as --checkpoint-every says, by itself the least with which it can
/// be placed; what a step needs, and options with budgets.
fn fit(decoder: Decoder, args: &Args, options: &Options) -> Result<(Decoder, Footprint, Options)> {
    let with = |every: usize| -> Result<(Decoder, Footprint, Options)> {
        let mut options = options.clone();
        let decoder = decoder.clone().with_checkpoints_every(every)?;
        let footprint = decoder.footprint(options.target()?)?;
        choose_budgets(&decoder, footprint, args, &mut options)?;
        requirements(decoder.model(), footprint, &options)?;
        Ok((decoder, footprint, options))
    };
    let first = match args.checkpoint_every {
        CheckpointEvery::Layers(layers) => return with(layers),
        CheckpointEvery::Auto => with(1),
    };
    let too_small = |error: &anyhow::Error| {
        let error = error.downcast_ref::<forebay::Error>();
        matches!(error, Some(forebay::Error::Placement(_)))
    };
    match first {
        // Where none fits, what the first one needs is said.
        Err(error) if too_small(&error) => {
            let mut others = 2..=decoder.config().layers;
            others.find_map(|every| with(every).ok()).ok_or(error)
        }
        first => first,
    }
}

/// Budgets that were not given: what the placement needs if it is named, or what the machine has, if
/// that is less. For the small model less than it needs, so that all three tiers have work: a third
/// of the layers on the device, half of the optimizer states in pinned memory, the rest on disk.
fn choose_budgets(
    decoder: &Decoder,
    footprint: Footprint,
    args: &Args,
    options: &mut Options,
) -> Result<()> {
    let needs = |policy: Policy, options: &Options| -> Result<Budgets> {
        let options = Options {
            placement: policy,
            ..options.clone()
        };
        Ok(requirements(decoder.model(), footprint, &options)?)
    };
    let small = args.config.is_none() && args.preset.is_none();
    let machine = forebay::machine::default_budgets(options.target()?);
    if options.device_budget.is_none() {
        options.device_budget = Some(match args.placement {
            Policy::Resident => needs(Policy::Resident, options)?
                .device_bytes
                .min(machine.device_bytes),
            // All parameters and checkpoints, and no optimizer states.
            _ if small => third_of_layers(decoder, &needs(Policy::Pinned, options)?),
            policy => needs(policy, options)?
                .device_bytes
                .min(machine.device_bytes),
        });
    }
    if options.pinned_budget.is_none() {
        options.pinned_budget = Some(match args.placement {
            Policy::Auto | Policy::Disk if small => {
                // The disk has the other half; nothing is left to keep what early updates overwrite.
                let waiting = Options {
                    ahead: Ahead::Never,
                    ..options.clone()
                };
                let all = needs(Policy::Pinned, &waiting)?.pinned_bytes;
                all - options.state_bytes() * decoder.model().parameters() / 2
            }
            policy => needs(policy, options)?
                .pinned_bytes
                .min(machine.pinned_bytes),
        });
    }
    Ok(())
}

/// What a resident model takes, less two thirds of its layers' parameters.
fn third_of_layers(decoder: &Decoder, resident: &Budgets) -> u64 {
    let layers = decoder.config().layers as u64;
    let leave = layers - layers.div_ceil(3).max(1);
    let sections = decoder.model().sections();
    let layer = sections
        .iter()
        .find(|s| s.name() == "layers.0")
        .map_or(0, |s| s.parameters());
    resident.device_bytes - leave * decoder.model().dtype().bytes() as u64 * layer
}

fn data_paths(args: &Args) -> Vec<PathBuf> {
    if args.data.is_empty() {
        vec![PathBuf::from(env!("CARGO_MANIFEST_DIR"))]
    } else {
        args.data.clone()
    }
}

/// The recipe of the run that a store holds.
fn stored_recipe(disk: &Disk) -> Result<Recipe> {
    let text = forebay::stored_user_text(&disk.folders[0])?;
    serde_json::from_str(&text).with_context(|| {
        format!(
            "{} was not written by this program's train",
            disk.folders[0].display()
        )
    })
}

/// The folders of the disk tier; without `--disk` one of its own, which goes when the run is whole.
struct Disk {
    folders: Vec<PathBuf>,
    own: bool,
}

impl Disk {
    fn new(args: &Args) -> Result<Self> {
        if !args.disk.is_empty() {
            return Ok(Self {
                folders: args.disk.clone(),
                own: false,
            });
        }
        if args.resume {
            bail!("--resume needs --disk, the folder of the run to go on with");
        }
        let folder = PathBuf::from(format!(".forebay/train-{}", std::process::id()));
        std::fs::create_dir_all(&folder)
            .with_context(|| format!("making {}; give --disk a folder", folder.display()))?;
        Ok(Self {
            folders: vec![folder],
            own: true,
        })
    }

    fn end(self, whole: bool, published: bool, printer: &Printer) -> Result<()> {
        if !self.own && !published {
            printer.note("nothing was published: the next run starts anew, in the same space");
            return Ok(());
        }
        if published && (!self.own || !whole) {
            printer.resume(&self.folders, whole);
            return Ok(());
        }
        std::fs::remove_dir_all(&self.folders[0])?;
        // The parent goes if no other run uses it.
        let _ = std::fs::remove_dir(".forebay");
        printer.note("the states were discarded with the run; --disk DIR keeps them");
        Ok(())
    }
}
