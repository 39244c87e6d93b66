//! Every optimizer against an f64 oracle written from its paper, per element, with planted defects that must fail
//! the same check; and the bits: of every path, number of threads and format of states, and of what is undone.
#![allow(clippy::unwrap_used)]

use forebay_kernels::cpu::{
    Adagrad, AdamW, Exchange, Isa, Kept, Lamb, Lion, Master, Moment, Optimizer, Scalars, Sgd,
    StateFormat, Workers, f32_to_bf16, update, update_ahead, update_rest, update_undo,
};
use half::bf16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const STEPS: u64 = 10;
const LR: f64 = 1e-3;
const SCALE: f64 = 0.37;
const ADAM: AdamW = AdamW {
    lr: LR,
    beta1: 0.9,
    beta2: 0.95,
    eps: 1e-8,
    weight_decay: 0.1,
};
const SGD: Sgd = Sgd {
    momentum: 0.9,
    nesterov: false,
    weight_decay: 0.1,
};
const LION: Lion = Lion {
    beta1: 0.9,
    beta2: 0.99,
    weight_decay: 0.1,
};
const ADAGRAD: Adagrad = Adagrad {
    lr_decay: 0.01,
    eps: 1e-10,
    weight_decay: 0.1,
};
const LAMB: Lamb = Lamb {
    beta1: 0.9,
    beta2: 0.95,
    eps: 1e-6,
    weight_decay: 0.1,
};

fn all() -> Vec<Optimizer> {
    vec![
        Optimizer::AdamW(ADAM),
        Optimizer::Sgd(SGD),
        Optimizer::Sgd(Sgd {
            nesterov: true,
            ..SGD
        }),
        Optimizer::Sgd(Sgd {
            momentum: 0.0,
            ..SGD
        }),
        Optimizer::Lion(LION),
        Optimizer::Adagrad(ADAGRAD),
        Optimizer::Lamb(LAMB),
    ]
}

fn fresh() -> ChaCha8Rng {
    let seed = std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
    println!("seed {seed}");
    ChaCha8Rng::seed_from_u64(seed)
}

/// Values of usual sizes, some tiny, some zero. None so near to zero beside its neighbours that a sign, on which
/// Lion depends, is a matter of rounding.
fn values(rng: &mut ChaCha8Rng, n: usize) -> Vec<f32> {
    let value = |rng: &mut ChaCha8Rng| match rng.random_range(0..12) {
        0 => 0.0,
        1 => rng.random_range(0.5..1.0) * 1e-12,
        2 => rng.random_range(-1.0..1.0) * 30.0,
        _ => rng.random_range(-1.0..1.0),
    };
    (0..n).map(|_| value(rng)).collect()
}

/// The memory of a part, in some format, with parameters in bf16.
#[derive(Clone)]
struct Memory {
    format: StateFormat,
    n: usize,
    /// Elements of the part, as parts are: a multiple of 64.
    part: usize,
    states: Vec<u64>,
    param: Vec<bf16>,
}

impl Memory {
    fn new(format: StateFormat, masters: &[f32]) -> Self {
        let n = masters.len();
        let mut masters = masters.to_vec();
        masters.resize(n.next_multiple_of(64), 0.0);
        let part = masters.len();
        let mut memory = Self {
            format,
            n,
            part,
            states: vec![0; (format.bytes() as usize * part).div_ceil(8)],
            param: vec![bf16::ZERO; part],
        };
        format.fill(bytemuck::cast_slice_mut(&mut memory.states), &masters);
        f32_to_bf16(&masters, &mut memory.param);
        memory
    }

    fn masters(&mut self) -> Vec<f32> {
        let mut masters = vec![0.0; self.part];
        let bytes = bytemuck::cast_slice_mut(&mut self.states);
        let params = bytemuck::cast_slice(&self.param);
        self.format.masters(bytes, params, &mut masters);
        masters.truncate(self.n);
        masters
    }

    fn step(&mut self, workers: &Workers, isa: Isa, scalars: &Scalars, grad: &[f32]) {
        let Self {
            format,
            n,
            part,
            states,
            param,
        } = self;
        let stored = format.view(bytemuck::cast_slice_mut(states), *part, 0..*n);
        let param = &mut param[..*n];
        update(
            workers,
            isa,
            scalars,
            stored,
            Exchange::F32ToBf16 { grad, param },
        );
    }
}

fn plain(optimizer: &Optimizer) -> StateFormat {
    StateFormat {
        master: Master::F32,
        moment: Moment::F32,
        moments: optimizer.moments(),
    }
}

/// The optimizers as their papers have them, in f64 throughout.
fn oracle(optimizer: &Optimizer, master: &[f32], grads: &[Vec<f32>]) -> Vec<f64> {
    let n = master.len();
    let mut p: Vec<f64> = master.iter().map(|x| f64::from(*x)).collect();
    let (mut m, mut v) = (vec![0.0f64; n], vec![0.0f64; n]);
    for (t, grad) in (1i32..).zip(grads) {
        let grad = |i: usize| f64::from(grad[i]) * SCALE;
        match optimizer {
            Optimizer::AdamW(o) => {
                for i in 0..n {
                    m[i] = o.beta1 * m[i] + (1.0 - o.beta1) * grad(i);
                    v[i] = o.beta2 * v[i] + (1.0 - o.beta2) * grad(i).powi(2);
                    let m_hat = m[i] / (1.0 - o.beta1.powi(t));
                    let v_hat = v[i] / (1.0 - o.beta2.powi(t));
                    p[i] -= LR * o.weight_decay * p[i];
                    p[i] -= LR * m_hat / (v_hat.sqrt() + o.eps);
                }
            }
            Optimizer::Sgd(o) => {
                for i in 0..n {
                    let g = grad(i) + o.weight_decay * p[i];
                    m[i] = o.momentum * m[i] + g;
                    let along = if o.nesterov {
                        g + o.momentum * m[i]
                    } else {
                        m[i]
                    };
                    p[i] -= LR * along;
                }
            }
            Optimizer::Lion(o) => {
                for i in 0..n {
                    let c = o.beta1 * m[i] + (1.0 - o.beta1) * grad(i);
                    let sign = if c == 0.0 { 0.0 } else { c.signum() };
                    p[i] -= LR * (sign + o.weight_decay * p[i]);
                    m[i] = o.beta2 * m[i] + (1.0 - o.beta2) * grad(i);
                }
            }
            Optimizer::Adagrad(o) => {
                for i in 0..n {
                    let g = grad(i) + o.weight_decay * p[i];
                    m[i] += g * g;
                    let rate = LR / (1.0 + f64::from(t - 1) * o.lr_decay);
                    p[i] -= rate * g / (m[i].sqrt() + o.eps);
                }
            }
            Optimizer::Lamb(o) => {
                let mut u = vec![0.0; n];
                for i in 0..n {
                    m[i] = o.beta1 * m[i] + (1.0 - o.beta1) * grad(i);
                    v[i] = o.beta2 * v[i] + (1.0 - o.beta2) * grad(i).powi(2);
                    let m_hat = m[i] / (1.0 - o.beta1.powi(t));
                    let v_hat = v[i] / (1.0 - o.beta2.powi(t));
                    u[i] = m_hat / (v_hat.sqrt() + o.eps) + o.weight_decay * p[i];
                }
                let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
                let ratio = norm(&p) / norm(&u);
                for i in 0..n {
                    p[i] -= LR * ratio * u[i];
                }
            }
        }
    }
    p
}

/// The largest |dp| / (1 + |p|) of any element.
fn error(got: &[f32], wanted: &[f64]) -> f64 {
    let all = got.iter().zip(wanted);
    all.map(|(g, w)| (f64::from(*g) - w).abs() / (1.0 + w.abs()))
        .fold(0.0, f64::max)
}

#[test]
fn ten_steps_are_within_a_millionth_of_the_oracle_on_every_path() {
    let mut rng = fresh();
    let workers = Workers::new(2, "test").unwrap();
    for n in [1, 15, 64, 1003, 50_000] {
        let masters = values(&mut rng, n);
        let grads: Vec<_> = (0..STEPS).map(|_| values(&mut rng, n)).collect();
        for (optimizer, isa) in all()
            .iter()
            .flat_map(|o| Isa::available().map(move |i| (o, i)))
        {
            let wanted = oracle(optimizer, &masters, &grads);
            let mut memory = Memory::new(plain(optimizer), &masters);
            for (t, grad) in (1..).zip(&grads) {
                memory.step(&workers, isa, &optimizer.at(t, LR, SCALE), grad);
            }
            let error = error(&memory.masters(), &wanted);
            println!("{} {isa:?}, {n} elements: {error:.2e}", optimizer.name());
            assert!(error <= 1e-6, "{optimizer:?} {isa:?}: {error:.2e}");
        }
    }
}

/// Ten steps of one optimizer under the scalars and gradients that a defect gives, beside the true oracle.
fn planted(optimizer: &Optimizer, alter: &dyn Fn(u64, &mut Vec<f32>) -> Scalars) -> f64 {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let workers = Workers::new(1, "test").unwrap();
    let n = 2000;
    let masters: Vec<f32> = (0..n).map(|_| rng.random_range(-1.0..1.0)).collect();
    let grads: Vec<Vec<f32>> = (0..STEPS)
        .map(|_| (0..n).map(|_| rng.random_range(-1.0..1.0)).collect())
        .collect();
    let wanted = oracle(optimizer, &masters, &grads);
    let mut memory = Memory::new(plain(optimizer), &masters);
    for (t, grad) in (1..).zip(&grads) {
        let mut grad = grad.clone();
        let scalars = alter(t, &mut grad);
        memory.step(&workers, Isa::Scalar, &scalars, &grad);
    }
    error(&memory.masters(), &wanted)
}

#[test]
fn the_check_fails_for_each_planted_defect() {
    for o in all() {
        let name = o.name();
        let good = planted(&o, &|t, _| o.at(t, LR, SCALE));
        assert!(good <= 1e-6, "{name} without a defect: {good:.2e}");
        let caught = |what: &str, alter: &dyn Fn(u64, &mut Vec<f32>) -> Scalars| {
            let error = planted(&o, alter);
            assert!(error > 1e-6, "{name}, {what}, passes: {error:.2e}");
        };
        caught("doing nothing", &|_, _| Scalars::Unchanged);
        caught("a flipped sign", &|t, _| o.at(t, LR, -SCALE));
        caught("a rate a tenth too high", &|t, _| o.at(t, 1.1 * LR, SCALE));
        caught("no decay", &|t, _| o.without_decay().at(t, LR, SCALE));
        caught("one gradient dropped", &|t, grad| {
            grad[77] = 0.0;
            o.at(t, LR, SCALE)
        });
    }
    // Of those that count steps, and of LAMB's ratio.
    for o in [
        Optimizer::AdamW(ADAM),
        Optimizer::Adagrad(ADAGRAD),
        Optimizer::Lamb(LAMB),
    ] {
        let error = planted(&o, &|_, _| o.at(1_000, LR, SCALE));
        assert!(error > 1e-6, "{} at a later step: {error:.2e}", o.name());
    }
    let adam = Optimizer::AdamW(ADAM);
    let error = planted(&Optimizer::Lamb(LAMB), &|t, _| adam.at(t, LR, SCALE));
    assert!(error > 1e-6, "AdamW passes for LAMB: {error:.2e}");
}

/// Ten steps in a format; the bits of states and parameters after each.
fn bits(
    optimizer: &Optimizer,
    format: StateFormat,
    n: usize,
    update: &dyn Fn(&mut Memory, &Scalars, &mut Vec<f32>),
) -> Vec<u64> {
    let mut rng = ChaCha8Rng::seed_from_u64(n as u64);
    let mut memory = Memory::new(format, &values(&mut rng, n));
    let mut bits = Vec::new();
    for t in 1..=STEPS {
        let mut grad = values(&mut rng, n);
        update(&mut memory, &optimizer.at(t, LR, SCALE), &mut grad);
        bits.extend(&memory.states);
        bits.extend(memory.param.iter().map(|x| u64::from(x.to_bits())));
        bits.extend(grad.iter().map(|x| u64::from(x.to_bits())));
    }
    bits
}

fn formats(optimizer: &Optimizer) -> Vec<StateFormat> {
    let masters = [Master::F32, Master::Split];
    let both = masters.into_iter().flat_map(|master| {
        [Moment::F32, Moment::Bf16].map(|moment| StateFormat {
            master,
            moment,
            moments: optimizer.moments(),
        })
    });
    both.collect()
}

#[test]
fn paths_and_threads_give_the_same_bits_in_every_format() {
    let one = Workers::new(1, "test").unwrap();
    for o in all() {
        for (format, n) in formats(&o)
            .into_iter()
            .flat_map(|f| [1, 33, 1000, 70_001].map(|n| (f, n)))
        {
            let reference = bits(&o, format, n, &|m, s, g| m.step(&one, Isa::Scalar, s, g));
            for (isa, threads) in Isa::available().flat_map(|isa| [(isa, 1), (isa, 3)]) {
                let workers = Workers::new(threads, "test").unwrap();
                let got = bits(&o, format, n, &|m, s, g| m.step(&workers, isa, s, g));
                assert!(
                    got == reference,
                    "{} {format:?} {isa:?}, {n}, {threads}",
                    o.name()
                );
            }
        }
    }
}

#[test]
fn a_split_master_is_the_whole_one_in_other_words() {
    let workers = Workers::new(2, "test").unwrap();
    for o in all() {
        let run = |master: Master| {
            let mut rng = ChaCha8Rng::seed_from_u64(5);
            let n = 5001;
            let format = StateFormat {
                master,
                ..plain(&o)
            };
            let mut memory = Memory::new(format, &values(&mut rng, n));
            let mut seen = Vec::new();
            for t in 1..=STEPS {
                let grad = values(&mut rng, n);
                memory.step(&workers, Isa::best(), &o.at(t, LR, SCALE), &grad);
                seen.extend(memory.masters().iter().map(|x| x.to_bits()));
                seen.extend(memory.param.iter().map(|x| u32::from(x.to_bits())));
            }
            seen
        };
        assert!(run(Master::F32) == run(Master::Split), "{}", o.name());
    }
}

#[test]
fn every_finite_master_is_its_parameter_and_rest() {
    let format = StateFormat {
        master: Master::Split,
        moment: Moment::F32,
        moments: 0,
    };
    let mut rng = fresh();
    let mut masters: Vec<f32> = (0..200_000u32)
        .map(|_| f32::from_bits(rng.random()))
        .filter(|x| x.is_finite())
        .collect();
    masters.extend([
        0.0,
        -0.0,
        f32::MAX,
        f32::MIN,
        f32::MIN_POSITIVE,
        1e-45,
        -1e-45,
    ]);
    masters.extend((0..=u16::MAX).map(|upper| f32::from_bits(u32::from(upper) << 16 | 0x8000)));
    masters.retain(|x| x.is_finite());
    let back = Memory::new(format, &masters).masters();
    let same = masters
        .iter()
        .zip(&back)
        .all(|(a, b)| a.to_bits() == b.to_bits());
    assert!(same, "a master was lost");
}

#[test]
fn bf16_moments_are_the_rounded_ones_and_too_slow_ones_are_refused() {
    let slow = Optimizer::AdamW(AdamW {
        beta2: 0.999,
        ..ADAM
    });
    let narrow = |o: &Optimizer| StateFormat {
        moment: Moment::Bf16,
        ..plain(o)
    };
    let why = slow.check(narrow(&slow)).unwrap_err();
    assert!(why.contains("0.999") && why.contains("fp32"), "{why}");
    for o in all() {
        let refused = matches!(o, Optimizer::Adagrad(_)) && o.check(narrow(&o)).is_err();
        assert!(refused || o.check(narrow(&o)).is_ok(), "{}", o.name());
        assert_eq!(o.check(plain(&o)), Ok(()));
    }
    // One step from zero moments: what is stored is the f32 moment, rounded.
    let o = Optimizer::AdamW(ADAM);
    let (mut rng, workers) = (fresh(), Workers::new(2, "test").unwrap());
    let (masters, grad) = (values(&mut rng, 3072), values(&mut rng, 3072));
    let run = |format: StateFormat| {
        let mut memory = Memory::new(format, &masters);
        memory.step(&workers, Isa::best(), &o.at(1, LR, SCALE), &grad);
        memory
    };
    let (wide, narrow) = (run(plain(&o)), run(narrow(&o)));
    let bytes: &[u8] = bytemuck::cast_slice(&wide.states);
    let moments: &[f32] = &bytemuck::cast_slice(bytes)[3072..9216];
    let mut wanted = vec![bf16::ZERO; 6144];
    f32_to_bf16(moments, &mut wanted);
    let bytes: &[u8] = bytemuck::cast_slice(&narrow.states);
    let got: &[bf16] = &bytemuck::cast_slice(bytes)[6144..12_288];
    assert!(got == wanted);
    assert!(
        wide.param == narrow.param,
        "the step itself is of the f32 moments"
    );
}

#[test]
fn an_update_ahead_has_the_same_bits_and_undone_leaves_none() {
    for o in all() {
        if o.log_bytes(plain(&o), 1).is_none() {
            assert_eq!(o.name(), "lamb");
            continue;
        }
        for (format, n) in formats(&o)
            .into_iter()
            .flat_map(|f| [7, 2048, 70_001].map(|n| (f, n)))
        {
            let one = Workers::new(1, "test").unwrap();
            let reference = bits(&o, format, n, &|m, s, g| m.step(&one, Isa::Scalar, s, g));
            let workers = Workers::new(3, "test").unwrap();
            let ahead = |m: &mut Memory, s: &Scalars, grad: &mut Vec<f32>| {
                let bytes = o.log_bytes(format, n).unwrap();
                let mut log = vec![0xa5; bytes];
                let before = m.clone();
                let guess = o.at(3, 7.0 * LR, 5.0);
                for (scalars, undo) in [(&guess, true), (s, false)] {
                    let (states, param) = (&mut m.states, &mut m.param);
                    let part = m.part;
                    let mut stored = format.view(bytemuck::cast_slice_mut(states), part, 0..n);
                    let param = &mut param[..n];
                    let mut e = Exchange::F32ToBf16 { grad, param };
                    let mut kept = Kept {
                        log: &mut log,
                        grad: &mut [],
                    };
                    let (w, isa) = (&workers, Isa::best());
                    update_ahead(
                        w,
                        isa,
                        scalars,
                        stored.reborrow(),
                        e.reborrow(),
                        kept.reborrow(),
                    );
                    if undo {
                        update_undo(w, isa, scalars, stored, e, kept);
                        assert!(m.states == before.states, "{} {format:?} {n}", o.name());
                        let split = format.master == Master::Split;
                        assert!(!split || m.param == before.param, "{} {n}", o.name());
                    } else {
                        update_rest(w, isa, scalars, stored, e, kept);
                    }
                }
            };
            let got = bits(&o, format, n, &ahead);
            assert!(got == reference, "{} {format:?}, {n} elements", o.name());
        }
    }
}

#[test]
fn an_undone_exchange_in_place_has_its_gradient_back() {
    let o = Optimizer::Lion(LION);
    let (n, format) = (3000, plain(&o));
    let (mut rng, workers) = (fresh(), Workers::new(2, "test").unwrap());
    let mut memory = Memory::new(format, &values(&mut rng, n));
    let (before, mut both) = (memory.states.clone(), values(&mut rng, n));
    let grad = both.clone();
    let mut log = vec![0; o.log_bytes(format, n).unwrap()];
    let mut kept_grad = vec![0; 4 * n];
    let s = o.at(1, LR, 1.0);
    for undo in [false, true] {
        let part = memory.part;
        let stored = format.view(bytemuck::cast_slice_mut(&mut memory.states), part, 0..n);
        let kept = Kept {
            log: &mut log,
            grad: &mut kept_grad,
        };
        let e = Exchange::InPlaceF32(&mut both);
        match undo {
            false => drop(update_ahead(&workers, Isa::best(), &s, stored, e, kept)),
            true => update_undo(&workers, Isa::best(), &s, stored, e, kept),
        }
        let masters = memory.masters();
        assert!(
            undo || both == masters,
            "the parameter takes the gradient's place"
        );
    }
    assert!(memory.states == before && both == grad);
}
