//! Forebay's decoder, run by the real trainer on the host device with its states on three tiers,
//! against Hugging Face transformers (fixtures) and the f64 oracle (fresh random models): logits,
//! loss and every gradient, per tensor.
#![allow(clippy::unwrap_used)]

mod fixtures;
mod oracle;

use std::collections::BTreeMap;

use forebay::{
    DType, LossScale, Options, Policy, Result, Section, SectionId, StageLease, TensorSpec, Trainer,
    Weights,
};
use forebay_decoder::{Batch, Config, Decoder, Positions};
use oracle::{Shape, Tensors, distance};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const TOLERANCE: f64 = 1e-5;
/// Of gradients in f16: what `fresh.py` has for torch's.
const SCALE: f64 = 4096.0;

fn loss_scale(dtype: DType) -> LossScale {
    match dtype {
        DType::F16 => LossScale::Fixed(SCALE),
        _ => LossScale::Auto,
    }
}

/// Weights by Hugging Face name.
struct Given<'w>(&'w Tensors);

fn hf_name(section: &str, tensor: &str) -> String {
    if section == "lm_head" {
        format!("{section}.{tensor}")
    } else {
        format!("model.{section}.{tensor}")
    }
}

impl Weights for Given<'_> {
    fn fill(&mut self, section: &Section, tensor: &TensorSpec, out: &mut [f32]) -> Result<()> {
        let values = &self.0[&hf_name(section.name(), &tensor.name)];
        assert_eq!(values.len(), out.len());
        out.iter_mut()
            .zip(values)
            .for_each(|(out, value)| *out = *value as f32);
        Ok(())
    }
}

struct Ours {
    logits: Vec<f64>,
    loss: f64,
    grads: BTreeMap<String, Vec<f64>>,
}

fn ours(config: &str, weights: &Tensors, ids: &[u32], targets: &[u32], seq: usize) -> Ours {
    ours_in(DType::F32, 1, config, weights, ids, targets, seq)
}

/// In so many micro-batches.
fn ours_in(
    dtype: DType,
    pieces: usize,
    config: &str,
    weights: &Tensors,
    ids: &[u32],
    targets: &[u32],
    seq: usize,
) -> Ours {
    let folder = tempfile::tempdir().unwrap();
    let config = Config::parse(config).unwrap();
    let decoder = Decoder::compute_in(dtype, config, ids.len() / seq, seq).unwrap();
    let decoder = decoder.in_micro_batches(pieces).unwrap();
    let mut options = Options::new([folder.path().to_owned()]);
    options.placement = Policy::Disk;
    options.threads = 2;
    options.loss_scale = loss_scale(dtype);
    let mut trainer = create(&decoder, weights, options);

    let step = trainer.eval().unwrap();
    let logits = decoder.logits(&step, ids, seq, Positions::All).unwrap();
    step.finish().unwrap();

    let mut grads = BTreeMap::new();
    let sections = decoder.model().sections();
    let step = trainer.begin(0.0).unwrap();
    let mut keep = |lease: &StageLease<'_>, id: SectionId| {
        for tensor in sections[id.0 as usize].tensors() {
            let grad = lease.grad(id, &tensor.name)?;
            let mut out = vec![0.0; tensor.shape.elements()];
            step.read(&grad.as_ref(), &mut out)?;
            let name = decoder.hf_name(id, &tensor.name);
            let scale = f64::from(step.loss_scale()?);
            grads.insert(name, out.iter().map(|g| f64::from(*g) / scale).collect());
        }
        Ok(())
    };
    decoder
        .train_step_observed(&step, &Batch { ids, targets }, &mut keep)
        .unwrap();
    let loss = f64::from(step.finish().unwrap().loss.unwrap());
    Ours {
        logits: logits.iter().map(|l| f64::from(*l)).collect(),
        loss,
        grads,
    }
}

/// A trainer with these weights under the least budgets.
fn create(decoder: &Decoder, weights: &Tensors, mut options: Options) -> Trainer {
    let footprint = decoder.footprint(options.target().unwrap()).unwrap();
    let needs = forebay::requirements(decoder.model(), footprint, &options).unwrap();
    options.device_budget = Some(needs.device_bytes);
    options.pinned_budget = Some(needs.pinned_bytes);
    let model = decoder.model().clone();
    Trainer::create(model, footprint, &options, &mut Given(weights)).unwrap()
}

/// The distance of every tensor, by name.
fn distances(ours: &Ours, logits: &[f64], loss: f64, grads: &Tensors) -> BTreeMap<String, f64> {
    let names: Vec<_> = grads.keys().collect();
    assert_eq!(
        ours.grads.keys().collect::<Vec<_>>(),
        names,
        "every tensor has a gradient"
    );
    let grads = grads.iter();
    let mut all: BTreeMap<_, _> = grads
        .map(|(name, g)| (name.clone(), distance(&ours.grads[name], g)))
        .collect();
    all.insert("logits".to_owned(), distance(&ours.logits, logits));
    all.insert("loss".to_owned(), distance(&[ours.loss], &[loss]));
    all
}

/// The largest distance of any tensor, and its name.
fn farthest(ours: &Ours, logits: &[f64], loss: f64, grads: &Tensors) -> (f64, String) {
    let all = distances(ours, logits, loss, grads).into_iter();
    let (name, error) = all.max_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
    (error, name)
}

#[test]
fn fresh_models_agree_with_torch_in_every_type() {
    for f in fixtures::fresh() {
        let exact = ours(&f.config, &f.weights, &f.ids, &f.targets, f.seq);
        let (error, name) = farthest(&exact, &f.logits, f.loss, &f.grads);
        println!("{}: fp32, farthest is {name}, {error:.2e}", f.name);
        assert!(error <= 1e-4, "{}: {name} differs by {error:.2e}", f.name);
        // A single number may be right by chance on one side.
        for (dtype, least_loss) in [(DType::Bf16, 2e-3), (DType::F16, 2.5e-4)] {
            let (ratio, what) = beside_torch(dtype, least_loss, &f);
            println!(
                "{}: {dtype}, error / torch's is at most {ratio:.2}: {what}",
                f.name
            );
            assert!(
                ratio <= 1.5,
                "{}: {dtype}, {ratio:.2} x torch's, {what}",
                f.name
            );
        }
    }
}

/// The largest error beside torch's own in this type, and of what. Torch's for the loss counts as this at least.
fn beside_torch(dtype: DType, least_loss: f64, f: &fixtures::Fixture) -> (f64, String) {
    let low = ours_in(dtype, 1, &f.config, &f.weights, &f.ids, &f.targets, f.seq);
    let all = distances(&low, &f.logits, f.loss, &f.grads).into_iter();
    let beside = all.map(|(name, error)| {
        let theirs = f.more[&format!("{dtype}.{name}")][0];
        let ratio = if name == "loss" {
            error / theirs.max(least_loss)
        } else {
            error / theirs
        };
        let what = format!("{name}, {error:.2e} for torch's {theirs:.2e}");
        (ratio, what)
    });
    beside.max_by(|a, b| a.0.total_cmp(&b.0)).unwrap()
}

/// Losses over the fixture's batches.
fn trained(dtype: DType, f: &fixtures::Fixture) -> Vec<f64> {
    let folder = tempfile::tempdir().unwrap();
    let config = Config::parse(&f.config).unwrap();
    let decoder = Decoder::compute_in(dtype, config, f.batch, f.seq).unwrap();
    let mut options = Options::new([folder.path().to_owned()]);
    options.loss_scale = loss_scale(dtype);
    let mut trainer = create(&decoder, &f.weights, options);
    let batches = f.train_ids.chunks(f.batch * f.seq);
    let losses = batches.map(|ids| {
        let step = trainer.begin(1e-3).unwrap();
        let targets = &fixtures::shifted(ids, f.seq);
        decoder.train_step(&step, &Batch { ids, targets }).unwrap();
        f64::from(step.finish().unwrap().loss.unwrap())
    });
    losses.collect()
}

#[test]
fn fresh_models_train_as_torch_trains_them() {
    for f in fixtures::fresh() {
        let (exact, theirs) = (trained(DType::F32, &f), &f.more["train_loss"]);
        let off = |(a, b): (&f64, &f64)| (a - b).abs() / b;
        let worst = exact.iter().zip(theirs).map(off).fold(0.0, f64::max);
        println!(
            "{}: {} steps, fp32, worst loss {worst:.1e}",
            f.name,
            exact.len()
        );
        assert!(worst <= 1e-4, "{}: {exact:?} for {theirs:?}", f.name);
        for dtype in [DType::Bf16, DType::F16] {
            let low = trained(dtype, &f);
            let theirs = &f.more[&format!("{dtype}_loss")];
            let other = &f.more[&format!("{dtype}_other")];
            let mean = |a: &[f64], b: &[f64]| {
                a.iter().zip(b).map(|(a, b)| (a - b).abs()).sum::<f64>() / a.len() as f64
            };
            let (off, spread) = (mean(&low, theirs), mean(other, theirs));
            println!(
                "{}: {dtype}, mean |loss - torch's| {off:.1e}, spread of torch's {spread:.1e}",
                f.name
            );
            assert!(off <= spread, "{}, {dtype}: {low:?} for {theirs:?}", f.name);
        }
    }
}

#[test]
fn logits_loss_and_gradients_agree_with_transformers() {
    for f in fixtures::all() {
        let ours = ours(&f.config, &f.weights, &f.ids, &f.targets, f.seq);
        let (error, name) = farthest(&ours, &f.logits, f.loss, &f.grads);
        println!("{}: farthest is {name}, {error:.2e}", f.name);
        assert!(
            error <= TOLERANCE,
            "{}: {name} differs by {error:.2e}",
            f.name
        );
    }
}

#[test]
fn in_bf16_and_f16_they_agree_as_far_as_their_eight_and_eleven_bits_go() {
    for f in fixtures::all() {
        for (dtype, most) in [(DType::Bf16, 0.05), (DType::F16, 0.05 / 8.0)] {
            let ours = ours_in(dtype, 1, &f.config, &f.weights, &f.ids, &f.targets, f.seq);
            let (error, name) = farthest(&ours, &f.logits, f.loss, &f.grads);
            println!("{}: {dtype}, farthest is {name}, {error:.2e}", f.name);
            let what = format!("{}, {dtype}: {name} differs by {error:.2e}", f.name);
            assert!(error <= most, "{what}");
            assert!(error > most / 50.0, "{what}, which is another type");
        }
    }
}

#[test]
fn logits_loss_and_gradients_agree_with_the_oracle_on_fresh_models() {
    let seed = std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
    println!("seed {seed}");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    for qk_norm in [false, true] {
        let kv_heads = rng.random_range(1..3);
        let shape = Shape {
            hidden: 2 * rng.random_range(8..16),
            intermediate: rng.random_range(20..50),
            layers: rng.random_range(1..4),
            heads: kv_heads * rng.random_range(1..4),
            kv_heads,
            head_dim: 2 * rng.random_range(2..8),
            vocabulary: rng.random_range(20..80),
            eps: 1e-6,
            theta: 10_000.0,
            tied: rng.random(),
            qk_norm,
        };
        let config = serde_json::json!({
            "model_type": if qk_norm { "qwen3" } else { "llama" },
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "vocab_size": shape.vocabulary,
            "rms_norm_eps": shape.eps,
            "rope_theta": shape.theta,
            "tie_word_embeddings": shape.tied,
        });
        let mut tensor = |(name, size): (String, usize)| {
            let center = if name.contains("norm") { 1.0 } else { 0.0 };
            // Rounded to f32, so that both sides start from the same weights.
            let value = |_| f64::from((center + rng.random_range(-0.2..0.2f64)) as f32);
            (name, (0..size).map(value).collect())
        };
        let mut weights: Tensors = shape.tensors().into_iter().map(&mut tensor).collect();
        // Of one token alone, queries and keys have no gradient that could be compared.
        let seq = rng.random_range(2..40);
        let tokens = 2 * seq;
        let mut draw = || {
            (0..tokens)
                .map(|_| rng.random_range(0..shape.vocabulary as u32))
                .collect()
        };
        let (ids, targets): (Vec<u32>, Vec<u32>) = (draw(), draw());
        let mine = ours(&config.to_string(), &weights, &ids, &targets, seq);
        let truth = oracle::run(&shape, &weights, &ids, &targets, seq);
        // Gradients of micro-batches add up to those of the batch.
        let config = config.to_string();
        let pieces = ours_in(DType::F32, 2, &config, &weights, &ids, &targets, seq);
        for mine in [&mine, &pieces] {
            let (error, name) = farthest(mine, &truth.logits, truth.loss, &truth.grads);
            println!("{shape:?}: farthest is {name}, {error:.2e}");
            assert!(
                error <= TOLERANCE,
                "{shape:?}: {name} differs by {error:.2e}"
            );
        }
        // Planted: one weight moved by a thousandth must show.
        weights
            .get_mut("model.layers.0.mlp.up_proj.weight")
            .unwrap()[0] += 1e-2;
        let truth = oracle::run(&shape, &weights, &ids, &targets, seq);
        let (error, _) = farthest(&mine, &truth.logits, truth.loss, &truth.grads);
        assert!(
            error > TOLERANCE,
            "a planted difference passes: {error:.2e}"
        );
    }
}
