//! A table that stages only gather rows from: equal bits wherever it lives, not a byte of it over the link
//! where that is pinned memory, and the same restrictions everywhere.
#![allow(clippy::unwrap_used)]

use forebay::ops::{self, ClassifierGrads};
use forebay::{
    DType, Error, Footprint, Init, Model, Options, Pass, Policy, RandomInit, Result, Section,
    SectionId, Stage, StageId, Step, Target, Trainer, Updates, footprint,
};

const TOKENS: usize = 48;
const VOCABULARY: usize = 64;
const HIDDEN: usize = 32;
const STEPS: u64 = 6;
const TABLE: SectionId = SectionId(0);
const HEAD: SectionId = SectionId(1);

/// The next token from the last one alone: a table, and a classifier of the same size.
struct Bigram {
    model: Model,
    footprint: Footprint,
}

impl Bigram {
    /// Whose first stage gathers from the table, or wants it whole.
    fn new(dtype: DType, gathers: bool) -> Self {
        let mut model = Model::new("bigram").compute_in(dtype);
        for name in ["table", "head"] {
            let normal = Init::Normal(0.3);
            model.section(Section::new(name).tensor("w", [VOCABULARY, HIDDEN], normal));
        }
        let embed = |stage: Stage| match gathers {
            true => stage.gathers([TABLE]),
            false => stage.params([TABLE]),
        };
        model.train_stage(embed(Stage::new("embed")));
        model.train_stage(Stage::new("head").params([HEAD]).grads([HEAD]));
        model.train_stage(Stage::new("embed backward").grads([TABLE]));
        model.eval_stage(embed(Stage::new("embed")));
        model.eval_stage(Stage::new("head").params([HEAD]));
        let target = Options::new(["unused".into()]).target().unwrap();
        let dry = |pass| footprint(&model, pass, target, |step| walk(step, pass, 0).map(drop));
        let footprint = dry(Pass::Train).unwrap().max(dry(Pass::Eval).unwrap());
        Self { model, footprint }
    }

    fn trainer(&self, options: &Options) -> Trainer {
        let needs = |placement| {
            let options = Options {
                placement,
                device_budget: None,
                pinned_budget: None,
                ..options.clone()
            };
            forebay::requirements(&self.model, self.footprint, &options).unwrap()
        };
        // One slot for the table and the head; but where all is to stay.
        let mut device = needs(Policy::Disk).device_bytes;
        if options.placement == Policy::Resident {
            device = needs(Policy::Resident).device_bytes;
        }
        let mut options = options.clone();
        options.device_budget = Some(device);
        let pinned = 2 * needs(Policy::Pinned).pinned_bytes;
        options.pinned_budget = Some(pinned);
        let model = self.model.clone();
        Trainer::create(model, self.footprint, &options, &mut RandomInit { seed: 3 }).unwrap()
    }

    /// Bits of the loss of each step, and of held-out ones after it; bytes to the device in training.
    fn run(&self, options: &Options) -> (Vec<u32>, u64) {
        let mut trainer = self.trainer(options);
        let mut bits = Vec::new();
        for index in 0..STEPS {
            let step = trainer.begin(0.02).unwrap();
            walk(&step, Pass::Train, index).unwrap();
            bits.extend(step.finish().unwrap().loss.map(f32::to_bits));
            if index % 2 == 1 {
                let step = trainer.eval().unwrap();
                bits.push(walk(&step, Pass::Eval, 99).unwrap().to_bits());
                step.finish().unwrap();
            }
        }
        trainer.settle().unwrap();
        (bits, trainer.report().hops[0].bytes)
    }
}

/// A pass over the model; the loss of a held-out batch.
fn walk(step: &Step<'_>, pass: Pass, seed: u64) -> Result<f32> {
    let token = |i: usize| ((i * i + 5 * i + 29 * seed as usize) % VOCABULARY) as u32;
    let ids: Vec<u32> = (0..TOKENS).map(token).collect();
    let targets: Vec<u32> = ids.iter().map(|id| (5 * id + 1) % 64).collect();
    let (ids, targets) = (
        step.upload(&ids, [TOKENS])?,
        step.upload(&targets, [TOKENS])?,
    );
    let frame = step.frame();
    let mut x = frame.tensor([TOKENS, HIDDEN])?;
    {
        let lease = step.enter(StageId::from(0))?;
        ops::embedding(step, &ids, &lease.param(TABLE, "w")?, &mut x)?;
    }
    let mut loss = step.tensor(DType::F32, [1])?;
    let mut dx = frame.tensor([TOKENS, HIDDEN])?;
    let scale = 1.0 / TOKENS as f32;
    let mut value = [0.0];
    {
        let lease = step.enter(StageId::from(1))?;
        let (x, weight) = (x.as_ref(), lease.param(HEAD, "w")?);
        if pass == Pass::Eval {
            ops::cross_entropy(step, &x, &weight, &targets, scale, &mut loss, None)?;
            step.read(&loss.as_ref(), &mut value)?;
            return Ok(value[0]);
        }
        let grads = ClassifierGrads {
            loss_scale: step.loss_scale()?,
            dx: dx.reborrow(),
            dweight: lease.grad(HEAD, "w")?,
        };
        ops::cross_entropy(step, &x, &weight, &targets, scale, &mut loss, Some(grads))?;
        step.loss(&loss.as_ref())?;
    }
    let lease = step.enter(StageId::from(2))?;
    ops::embedding_backward(step, &ids, &dx.as_ref(), &mut lease.grad(TABLE, "w")?)?;
    Ok(value[0])
}

fn options(folder: &tempfile::TempDir, placement: Policy) -> Options {
    let mut options = Options::new([folder.path().to_owned()]);
    (options.placement, options.threads) = (placement, 1);
    options.optimizer_chunk = Some(512);
    options
}

#[test]
fn wherever_a_table_lives_the_bits_are_the_same_and_from_pinned_memory_no_byte_of_it_is_copied() {
    for dtype in [DType::F32, DType::Bf16, DType::F16] {
        let (whole, rows) = (Bigram::new(dtype, false), Bigram::new(dtype, true));
        let table = (VOCABULARY * HIDDEN * dtype.bytes()) as u64;
        for (clip, updates) in [
            (Some(0.5), Updates::Exact),
            (None, Updates::Exact),
            (Some(0.5), Updates::Delayed),
        ] {
            let run = |model: &Bigram, placement, lookahead| {
                let folder = tempfile::tempdir().unwrap();
                let mut options = options(&folder, placement);
                (options.clip, options.lookahead) = (clip, lookahead);
                options.updates = updates;
                model.run(&options)
            };
            let (reference, _) = run(&whole, Policy::Resident, 2);
            let losses: Vec<f32> = reference.iter().map(|b| f32::from_bits(*b)).collect();
            assert!(losses.last() < losses.first(), "it learns: {losses:?}");
            for lookahead in [0, 2] {
                let what = format!("{dtype}, clip {clip:?}, {updates:?}, look-ahead {lookahead}");
                let both = |placement| {
                    let [whole, rows] = [&whole, &rows].map(|m| run(m, placement, lookahead));
                    assert_eq!(whole.0, reference, "{what}, {placement:?}, whole");
                    assert_eq!(rows.0, reference, "{what}, {placement:?}, rows");
                    (whole.1, rows.1)
                };
                let (with, without) = both(Policy::Pinned);
                assert_eq!(with - without, STEPS * table, "{what}");
                let (with, without) = both(Policy::Disk);
                assert_eq!(with, without, "{what}: it comes as a whole");
                let (with, without) = both(Policy::Resident);
                assert_eq!(with, without, "{what}: it is there");
            }
        }
    }
}

#[test]
fn what_is_gathered_from_is_read_by_operations_and_by_nothing_else_wherever_it_lives() {
    for placement in [Policy::Resident, Policy::Pinned, Policy::Disk] {
        let folder = tempfile::tempdir().unwrap();
        let mut trainer = Bigram::new(DType::F32, true).trainer(&options(&folder, placement));
        let step = trainer.begin(0.02).unwrap();
        let frame = step.frame();
        let mut x = frame.tensor([VOCABULARY, HIDDEN]).unwrap();
        let lease = step.enter(StageId::from(0)).unwrap();
        let table = lease.param(TABLE, "w").unwrap();
        let row = table.rows(3, 1).unwrap();
        let refused = [
            step.read(&row, &mut [0.0; HIDDEN]),
            ops::copy(&step, &table, &mut x),
            step.loss(&row.reshape([HIDDEN]).unwrap().rows(0, 1).unwrap()),
        ];
        for refused in refused {
            let error = refused.unwrap_err();
            assert!(matches!(error, Error::Misuse(_)), "{placement:?}: {error}");
            assert!(
                error.to_string().contains("'table' is gathered from"),
                "{error}"
            );
        }
        ops::add(&step, &table, &table, &mut x).unwrap();
        let mut sum = vec![0.0; VOCABULARY * HIDDEN];
        step.read(&x.as_ref(), &mut sum).unwrap();
        assert!(sum.iter().any(|x| *x != 0.0) && sum.iter().all(|x| x.is_finite()));
    }
}

#[test]
fn a_stage_names_a_section_in_one_way() {
    let mut model = Model::new("both");
    let w = model.section(Section::new("w").tensor("w", [4, 4], Init::Constant(1.0)));
    model.train_stage(Stage::new("s").params([w]).gathers([w]));
    let folder = tempfile::tempdir().unwrap();
    let made = Trainer::create(
        model,
        Footprint::default(),
        &options(&folder, Policy::Pinned),
        &mut RandomInit { seed: 0 },
    );
    let error = made.unwrap_err().to_string();
    assert!(
        error.contains("'w' in its params and in its gathers"),
        "{error}"
    );
}

#[test]
fn on_the_host_device_a_table_in_bf16_takes_no_scratch() {
    let scratch = |rows: usize| {
        let mut model = Model::new("rows").compute_in(DType::Bf16);
        let table = Section::new("table").tensor("w", [rows, HIDDEN], Init::Normal(0.3));
        let table = model.section(table);
        let stage = model.eval_stage(Stage::new("embed").gathers([table]));
        let walk = |step: &Step<'_>| {
            let ids = step.upload(&[0; TOKENS], [TOKENS])?;
            let mut x = step.tensor(DType::Bf16, [TOKENS, HIDDEN])?;
            let lease = step.enter(stage)?;
            ops::embedding(step, &ids, &lease.param(table, "w")?, &mut x)
        };
        let target = Target::Host { threads: 1 };
        footprint(&model, Pass::Eval, target, walk)
            .unwrap()
            .scratch_bytes
    };
    assert_eq!(scratch(100_000), scratch(10));
}
