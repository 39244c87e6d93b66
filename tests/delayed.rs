//! One-step delayed updates: the bits of AdamW applied a step late by hand, wherever states live; and what has the
//! gradient that waits applied.
#![allow(clippy::unwrap_used)]

mod common;

use common::{config, create, options, resume, split, tokens, with_budgets};
use forebay::{
    Ahead, DType, Options, Policy, RandomInit, Result, Section, SectionId, StageLease, TensorSpec,
    Trainer, Updates, Weights,
};
use forebay_decoder::{Batch, Config, Decoder};

const POLICIES: [Policy; 4] = [Policy::Auto, Policy::Resident, Policy::Pinned, Policy::Disk];
const LR: f64 = 5e-3;

/// What happens in a run.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Event {
    Step,
    /// A step one of whose gradients is infinite.
    Poisoned,
    /// A step whose gradient is thrown away.
    Discarded,
    /// A forward pass; it has the gradient that waits applied.
    Eval,
    /// As it says; so does it.
    Settle,
    /// Everything is published, and the run goes on from there in a new trainer.
    Resume,
}
use Event::{Discarded, Eval, Poisoned, Resume, Settle, Step};

/// Steps enough to see each gradient applied.
const PLAIN: [Event; 8] = [Step; 8];
const MIXED: [Event; 18] = [
    Step, Step, Eval, Step, Poisoned, Step, Step, Discarded, Step, Settle, Step, Poisoned, Resume,
    Step, Step, Discarded, Eval, Step,
];

#[derive(Clone, Copy, Debug)]
struct Case {
    dtype: DType,
    clip: Option<f64>,
    micro_batches: usize,
    tied: bool,
}

impl Case {
    fn decoder(self) -> Decoder {
        let config = Config {
            tied: self.tied,
            ..config()
        };
        Decoder::compute_in(self.dtype, config, common::BATCH, common::SEQ)
            .unwrap()
            .in_micro_batches(self.micro_batches)
            .unwrap()
    }

    /// The bits of all losses of a delayed run, and the steps that it skipped.
    fn run(self, events: &[Event], change: impl Fn(&mut Options)) -> (Vec<u32>, u64) {
        self.run_with(events, None, change)
    }

    /// As many thirds of the optimizer states on the device.
    fn run_with(
        self,
        events: &[Event],
        thirds: Option<u64>,
        change: impl Fn(&mut Options),
    ) -> (Vec<u32>, u64) {
        let folder = tempfile::tempdir().unwrap();
        let decoder = self.decoder();
        let mut options = options(folder.path());
        (options.clip, options.updates) = (self.clip, Updates::Delayed);
        change(&mut options);
        let options = match thirds {
            Some(thirds) => split(options, &decoder, thirds),
            None => with_budgets(options, &decoder),
        };
        let mut trainer = create(&decoder, &options);
        let (mut bits, mut skipped) = (Vec::new(), 0);
        for event in events {
            match event {
                Step | Poisoned | Discarded => {
                    let number = trainer.steps();
                    bits.push(observed(
                        &mut trainer,
                        &decoder,
                        number,
                        *event,
                        |_, _, _| Ok(()),
                    ));
                }
                Eval => bits.push(eval(&mut trainer, &decoder)),
                Settle => trainer.settle().unwrap(),
                Resume => {
                    let steps = trainer.steps();
                    trainer.publish("").unwrap();
                    skipped += trainer.skipped();
                    drop(trainer);
                    trainer = resume(&decoder, &options);
                    assert_eq!(trainer.steps(), steps);
                }
            }
        }
        trainer.settle().unwrap();
        (bits, skipped + trainer.skipped())
    }
}

/// A step; `see` is called for each section whose gradient is whole.
fn observed(
    trainer: &mut Trainer,
    decoder: &Decoder,
    number: u64,
    event: Event,
    mut see: impl FnMut(&forebay::Step<'_>, &StageLease<'_>, SectionId) -> Result<()>,
) -> u32 {
    let (ids, targets) = tokens(number);
    let batch = Batch {
        ids: &ids,
        targets: &targets,
    };
    let step = trainer.begin(LR).unwrap();
    let mut observer = |lease: &StageLease<'_>, id: SectionId| {
        if event == Poisoned && id == SectionId(0) {
            step.launch(common::Poison, &[], &[lease.grad(id, "weight")?])?;
        }
        see(&step, lease, id)
    };
    decoder
        .train_step_observed(&step, &batch, &mut observer)
        .unwrap();
    let finished = match event {
        Discarded => step.discard(),
        _ => step.finish(),
    };
    finished.unwrap().loss.unwrap().to_bits()
}

fn eval(trainer: &mut Trainer, decoder: &Decoder) -> u32 {
    let (ids, targets) = tokens(50);
    let batch = Batch {
        ids: &ids,
        targets: &targets,
    };
    let step = trainer.eval().unwrap();
    let loss = decoder.eval_loss(&step, &batch).unwrap();
    step.finish().unwrap();
    loss.to_bits()
}

/// A tensor's fp32 master and moments.
struct Kept {
    section: String,
    id: SectionId,
    spec: TensorSpec,
    master: Vec<f32>,
    m: Vec<f32>,
    v: Vec<f32>,
}

/// Makes weights and keeps them, or gives those that were kept.
struct Notes<'k> {
    kept: &'k mut Vec<Kept>,
    make: bool,
}

impl Weights for Notes<'_> {
    fn fill(&mut self, section: &Section, spec: &TensorSpec, out: &mut [f32]) -> Result<()> {
        if self.make {
            RandomInit { seed: 5 }.fill(section, spec, out)?;
            let id = match self.kept.last() {
                Some(last) if last.section == section.name() => last.id,
                Some(last) => SectionId(last.id.0 + 1),
                None => SectionId(0),
            };
            self.kept.push(Kept {
                section: section.name().to_owned(),
                id,
                spec: spec.clone(),
                master: out.to_vec(),
                m: vec![0.0; out.len()],
                v: vec![0.0; out.len()],
            });
        }
        let of = |k: &&Kept| k.section == section.name() && k.spec.name == spec.name;
        out.copy_from_slice(&self.kept.iter().find(of).unwrap().master);
        Ok(())
    }
}

/// The same run by hand: gradients and losses from trainers that do a single step, on the parameters that a step
/// is to see; AdamW here.
struct ByHand {
    case: Case,
    decoder: Decoder,
    kept: Vec<Kept>,
    applied: u64,
    skipped: u64,
    /// By tensor, and their global norm.
    waiting: Option<(Vec<Vec<f32>>, f64)>,
}

impl ByHand {
    fn new(case: Case) -> Self {
        let mut hand = Self {
            case,
            decoder: case.decoder(),
            kept: Vec::new(),
            applied: 0,
            skipped: 0,
            waiting: None,
        };
        let mut kept = Vec::new();
        hand.trainer(&mut Notes {
            kept: &mut kept,
            make: true,
        });
        hand.kept = kept;
        hand
    }

    fn trainer(&self, weights: &mut dyn Weights) -> Trainer {
        let folder = tempfile::tempdir().unwrap();
        let mut options = options(folder.path());
        (options.placement, options.clip) = (Policy::Resident, None);
        let options = with_budgets(options, &self.decoder);
        let footprint = self.decoder.footprint(options.target().unwrap()).unwrap();
        let model = self.decoder.model().clone();
        Trainer::create(model, footprint, &options, weights).unwrap()
    }

    fn seen(&mut self) -> Trainer {
        let mut kept = std::mem::take(&mut self.kept);
        let trainer = self.trainer(&mut Notes {
            kept: &mut kept,
            make: false,
        });
        self.kept = kept;
        trainer
    }

    /// A step on the parameters that there are. `late` gradients wait for the step behind it, others are applied.
    fn step(&mut self, number: u64, event: Event, late: bool) -> u32 {
        let mut trainer = self.seen();
        let mut grads: Vec<Vec<f32>> = self.kept.iter().map(|k| k.master.clone()).collect();
        let kept = &self.kept;
        let see = |step: &forebay::Step<'_>, lease: &StageLease<'_>, id| {
            for (kept, grad) in kept.iter().zip(&mut grads).filter(|(k, _)| k.id == id) {
                step.read(&lease.grad(id, &kept.spec.name)?.as_ref(), grad)?;
            }
            Ok(())
        };
        let loss = observed(&mut trainer, &self.decoder, number, event, see);
        trainer.settle().unwrap();
        let norm = trainer.grad_norm();
        if late {
            self.apply();
        }
        self.waiting = (event != Discarded).then_some((grads, norm));
        if !late {
            self.apply();
        }
        loss
    }

    fn apply(&mut self) {
        let Some((grads, norm)) = self.waiting.take() else {
            return;
        };
        if !norm.is_finite() {
            self.skipped += 1;
            return;
        }
        self.applied += 1;
        let (beta1, beta2) = (0.9f64, 0.95f64);
        let power = |beta: f64| beta.powf(self.applied as f64);
        let rate = (-LR / (1.0 - power(beta1))) as f32;
        let root = (1.0 / (1.0 - power(beta2)).sqrt()) as f32;
        let scale = self.case.clip.map_or(1.0, |c| (c / (norm + 1e-6)).min(1.0)) as f32;
        for (kept, grads) in self.kept.iter_mut().zip(grads) {
            let decay = if kept.spec.decay { 0.1 } else { 0.0 };
            let keep = (1.0 - LR * decay) as f32;
            let states = kept.master.iter_mut().zip(&mut kept.m).zip(&mut kept.v);
            for (((p, m), v), grad) in states.zip(grads) {
                let grad = match self.case.dtype {
                    DType::Bf16 => f32::from_bits((grad.to_bits() + 0x8000) & 0xffff_0000),
                    _ => grad,
                };
                let g = grad * scale;
                *m = (beta1 as f32).mul_add(*m, (1.0 - beta1) as f32 * g);
                *v = (beta2 as f32).mul_add(*v, ((1.0 - beta2) as f32 * g) * g);
                *p = rate.mul_add(*m / v.sqrt().mul_add(root, 1e-8), *p * keep);
            }
        }
    }

    /// The bits of all losses, and the steps skipped.
    fn run(mut self, events: &[Event], late: bool) -> (Vec<u32>, u64) {
        let (mut bits, mut number) = (Vec::new(), 0);
        for event in events {
            match event {
                Step | Poisoned | Discarded => {
                    bits.push(self.step(number, *event, late));
                    number += 1;
                }
                Eval => {
                    self.apply();
                    bits.push(eval(&mut self.seen(), &self.decoder));
                }
                Settle | Resume => self.apply(),
            }
        }
        self.apply();
        (bits, self.skipped)
    }
}

const CASES: [Case; 4] = [
    // The gradient's norm is about 2: each step clips.
    Case {
        dtype: DType::F32,
        clip: Some(0.1),
        micro_batches: 1,
        tied: false,
    },
    Case {
        dtype: DType::F32,
        clip: None,
        micro_batches: 2,
        tied: true,
    },
    Case {
        dtype: DType::Bf16,
        clip: Some(0.1),
        micro_batches: 2,
        tied: false,
    },
    Case {
        dtype: DType::Bf16,
        clip: None,
        micro_batches: 1,
        tied: true,
    },
];

#[test]
fn a_delayed_run_has_the_bits_of_adamw_applied_a_step_late_by_hand_wherever_states_live() {
    for case in CASES {
        let reference = ByHand::new(case).run(&PLAIN, true);
        for placement in POLICIES {
            for (lookahead, threads) in [(0, 1), (1, 2), (2, 1), (4, 2)] {
                let got = case.run(&PLAIN, |o| {
                    (o.placement, o.lookahead, o.threads) = (placement, lookahead, threads);
                });
                assert_eq!(
                    got, reference,
                    "{case:?}, {placement:?}, look-ahead {lookahead}, {threads} threads"
                );
            }
        }
        // A control of both: without the delay the losses are others, by hand and in a run, and the same.
        let exact = case.run(&PLAIN, |o| o.updates = Updates::Exact);
        assert_eq!(exact, ByHand::new(case).run(&PLAIN, false));
        assert_ne!(exact, reference);
        assert_eq!(exact.0[..1], reference.0[..1]);
    }
}

#[test]
fn gradients_skipped_or_discarded_and_those_applied_early_for_whom_they_wait_are_as_by_hand() {
    for case in CASES {
        let reference = ByHand::new(case).run(&MIXED, true);
        assert_eq!(reference.1, 2);
        for placement in POLICIES {
            for lookahead in [0, 2] {
                let got = case.run(&MIXED, |o| {
                    (o.placement, o.lookahead) = (placement, lookahead);
                });
                assert_eq!(got, reference, "{case:?}, {placement:?}, {lookahead}");
            }
        }
        // New parameters pushed to the device, made there, read in parts from disk.
        for placement in [Policy::Resident, Policy::Auto] {
            for thirds in 0..=2 {
                let got = case.run_with(&MIXED, Some(thirds), |o| o.placement = placement);
                let what = format!("{case:?}, {placement:?}, {thirds} thirds on the device");
                assert_eq!(got, reference, "{what}");
            }
        }
        // Whoever asks for parameters of all gradients changes what comes behind.
        let others: Vec<Event> = MIXED.into_iter().filter(|e| *e != Settle).collect();
        assert_ne!(case.run(&others, |_| ()), reference);
    }
}

#[test]
fn a_delayed_run_learns_about_as_fast_as_an_exact_one() {
    let learned = |updates| {
        let folder = tempfile::tempdir().unwrap();
        let decoder = CASES[0].decoder();
        let mut options = options(folder.path());
        options.updates = updates;
        let options = with_budgets(options, &decoder);
        let mut trainer = create(&decoder, &options);
        let loss = |_| {
            let bits = observed(&mut trainer, &decoder, 3, Step, |_, _, _| Ok(()));
            f32::from_bits(bits)
        };
        let losses: Vec<f32> = (0..40).map(loss).collect();
        losses[0] - losses[39]
    };
    let (exact, delayed) = (learned(Updates::Exact), learned(Updates::Delayed));
    assert!(
        delayed > 1.0 && delayed > 0.8 * exact,
        "{delayed} of {exact}"
    );
}

#[test]
fn what_would_run_ahead_of_the_norm_and_behind_it_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let decoder = CASES[0].decoder();
    let mut options = with_budgets(options(folder.path()), &decoder);
    (options.updates, options.ahead) = (Updates::Delayed, Ahead::Always);
    let footprint = decoder.footprint(options.target().unwrap()).unwrap();
    let refused = forebay::requirements(decoder.model(), footprint, &options);
    let error = refused.unwrap_err().to_string();
    assert!(error.contains("leave Ahead at auto"), "{error}");
}
