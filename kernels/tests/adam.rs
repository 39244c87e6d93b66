//! AdamW against an f64 oracle, per element, on every path that this machine has; with negative
//! controls that must fail the same check.
#![allow(clippy::unwrap_used)]

use forebay_kernels::cpu::{
    AdamScalars, AdamW, Exchange, Isa, Kept, NormIn, States, Workers, adamw, adamw_ahead,
    adamw_parallel, adamw_rest, adamw_undo, bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16,
    log_bytes, round_to_bf16, round_to_f16, square_sum, widen_f16,
};
use half::{bf16, f16};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const ADAM: AdamW = AdamW {
    lr: 1e-3,
    beta1: 0.9,
    beta2: 0.95,
    eps: 1e-8,
    weight_decay: 0.1,
};
const STEPS: u64 = 10;
const SCALE: f64 = 0.37;

fn fresh() -> (u64, ChaCha8Rng) {
    let seed = std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
    println!(
        "seed {seed}; paths {:?}",
        Isa::available().collect::<Vec<_>>()
    );
    (seed, ChaCha8Rng::seed_from_u64(seed))
}

/// Random values over the whole range that training meets: zeros, subnormals, tiny, usual, huge.
fn value(rng: &mut ChaCha8Rng) -> f32 {
    match rng.random_range(0..10) {
        0 => 0.0,
        1 => f32::from_bits(rng.random_range(1..0x0080_0000)),
        2 => rng.random_range(-1.0..1.0) * 1e-20,
        3 => rng.random_range(-1.0..1.0) * 1e4,
        _ => rng.random_range(-1.0..1.0),
    }
}

fn values(rng: &mut ChaCha8Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| value(rng)).collect()
}

#[derive(Clone)]
struct Memory {
    master: Vec<f32>,
    m: Vec<f32>,
    v: Vec<f32>,
}

impl Memory {
    fn new(master: &[f32]) -> Self {
        Self {
            master: master.to_vec(),
            m: vec![0.0; master.len()],
            v: vec![0.0; master.len()],
        }
    }

    fn states(&mut self) -> States<'_> {
        States {
            master: &mut self.master,
            m: &mut self.m,
            v: &mut self.v,
        }
    }

    fn bits(&self) -> Vec<u32> {
        [&self.master, &self.m, &self.v]
            .into_iter()
            .flatten()
            .map(|x| x.to_bits())
            .collect()
    }
}

/// AdamW as the paper has it, in f64 throughout.
fn oracle(adam: &AdamW, master: &[f32], grads: &[Vec<f32>]) -> Vec<f64> {
    let n = master.len();
    let mut p: Vec<f64> = master.iter().map(|x| f64::from(*x)).collect();
    let (mut m, mut v) = (vec![0.0; n], vec![0.0; n]);
    for (t, grad) in (1..).zip(grads) {
        for i in 0..n {
            let g = f64::from(grad[i]) * SCALE;
            p[i] -= adam.lr * adam.weight_decay * p[i];
            m[i] = adam.beta1 * m[i] + (1.0 - adam.beta1) * g;
            v[i] = adam.beta2 * v[i] + (1.0 - adam.beta2) * g * g;
            let m_hat = m[i] / (1.0 - adam.beta1.powi(t));
            let v_hat: f64 = v[i] / (1.0 - adam.beta2.powi(t));
            p[i] -= adam.lr * m_hat / (v_hat.sqrt() + adam.eps);
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
    let (_, mut rng) = fresh();
    for n in [1, 15, 64, 1003, 50_000] {
        let master = values(&mut rng, n);
        let grads: Vec<_> = (0..STEPS).map(|_| values(&mut rng, n)).collect();
        let wanted = oracle(&ADAM, &master, &grads);
        for isa in Isa::available() {
            let mut memory = Memory::new(&master);
            let mut param = vec![0.0; n];
            for (t, grad) in (1..).zip(&grads) {
                let exchange = Exchange::F32 {
                    grad,
                    param: &mut param,
                };
                adamw(isa, &ADAM.at(t, ADAM.lr, SCALE), memory.states(), exchange);
            }
            let error = error(&memory.master, &wanted);
            println!("{isa:?}, {n} elements: {error:.2e}");
            assert!(error <= 1e-6, "{isa:?}: {error:.2e}");
            assert_eq!(param, memory.master);
        }
    }
}

/// Runs the scalar path under altered scalars and gives its distance from the true oracle.
fn planted(alter: impl Fn(u64, &mut Vec<f32>) -> AdamScalars) -> f64 {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let n = 2000;
    let master: Vec<f32> = (0..n).map(|_| rng.random_range(-1.0..1.0)).collect();
    let grads: Vec<Vec<f32>> = (0..STEPS)
        .map(|_| (0..n).map(|_| rng.random_range(-1.0..1.0)).collect())
        .collect();
    let wanted = oracle(&ADAM, &master, &grads);
    let mut memory = Memory::new(&master);
    for (t, grad) in (1..).zip(&grads) {
        let mut grad = grad.clone();
        let scalars = alter(t, &mut grad);
        adamw(
            Isa::Scalar,
            &scalars,
            memory.states(),
            Exchange::InPlaceF32(&mut grad),
        );
    }
    error(&memory.master, &wanted)
}

#[test]
fn the_check_fails_for_each_planted_defect() {
    let good = |t: u64, _: &mut Vec<f32>| ADAM.at(t, ADAM.lr, SCALE);
    assert!(planted(good) <= 1e-6, "the control without a defect");
    let caught = |name: &str, error: f64| assert!(error > 1e-6, "{name} passes: {error:.2e}");
    caught("doing nothing", planted(|_, _| AdamScalars::unchanged()));
    caught(
        "a flipped sign",
        planted(|t, _| ADAM.at(t, ADAM.lr, -SCALE)),
    );
    caught(
        "no bias correction",
        planted(|_, _| ADAM.at(100_000, ADAM.lr, SCALE)),
    );
    caught(
        "a learning rate a tenth too high",
        planted(|t, _| ADAM.at(t, 1.1 * ADAM.lr, SCALE)),
    );
    let no_decay = AdamW {
        weight_decay: 0.0,
        ..ADAM
    };
    caught(
        "dropped weight decay",
        planted(|t, _| no_decay.at(t, ADAM.lr, SCALE)),
    );
    caught(
        "one gradient element dropped",
        planted(|t, grad| {
            grad[77] = 0.0;
            ADAM.at(t, ADAM.lr, SCALE)
        }),
    );
}

/// Ten steps with every kind of exchange on one path; the bits of everything written.
fn all_exchanges(update: &dyn Fn(&AdamScalars, States<'_>, Exchange<'_>), n: usize) -> Vec<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(n as u64);
    let master = values(&mut rng, n);
    let mut memory = Memory::new(&master);
    let (mut param, mut narrow) = (vec![0.0; n], vec![bf16::ZERO; n]);
    let mut narrow_half = vec![f16::ZERO; n];
    let mut bits = Vec::new();
    for t in 1..=STEPS {
        let mut wide = values(&mut rng, n);
        let mut grad = vec![bf16::ZERO; n];
        f32_to_bf16(&wide, &mut grad);
        let mut half = vec![f16::ZERO; n];
        f32_to_f16(&wide, &mut half);
        let scalars = ADAM.at(t, ADAM.lr, SCALE);
        let exchange = match t % 10 {
            0 => Exchange::F32 {
                grad: &wide,
                param: &mut param,
            },
            1 => Exchange::InPlaceF32(&mut wide),
            2 => Exchange::Bf16 {
                grad: &grad,
                param: &mut narrow,
            },
            3 => Exchange::InPlaceBf16(&mut grad),
            4 => Exchange::F32ToBf16 {
                grad: &wide,
                param: &mut narrow,
            },
            5 => Exchange::Bf16ToF32 {
                grad: &grad,
                param: &mut param,
            },
            6 => Exchange::F16 {
                grad: &half,
                param: &mut narrow_half,
            },
            7 => Exchange::InPlaceF16(&mut half),
            8 => Exchange::F32ToF16 {
                grad: &wide,
                param: &mut narrow_half,
            },
            _ => Exchange::F16ToF32 {
                grad: &half,
                param: &mut param,
            },
        };
        update(&scalars, memory.states(), exchange);
        bits.extend(memory.bits());
        bits.extend(wide.iter().chain(&param).map(|x| x.to_bits()));
        bits.extend(grad.iter().chain(&narrow).map(|x| u32::from(x.to_bits())));
        let halves = half.iter().chain(&narrow_half);
        bits.extend(halves.map(|x| u32::from(x.to_bits())));
    }
    bits
}

#[test]
fn paths_threads_and_chunks_give_the_same_bits() {
    for n in [1, 7, 33, 1000, 70_001] {
        let reference = all_exchanges(&|s, states, e| adamw(Isa::Scalar, s, states, e), n);
        for isa in Isa::available() {
            let single = all_exchanges(&|s, states, e| adamw(isa, s, states, e), n);
            assert!(single == reference, "{isa:?}, {n} elements");
            for threads in [1, 2, 5] {
                let workers = Workers::new(threads, "test").unwrap();
                let parallel = all_exchanges(
                    &|s, states, e| adamw_parallel(&workers, isa, s, states, e),
                    n,
                );
                assert!(
                    parallel == reference,
                    "{isa:?}, {n} elements, {threads} threads"
                );
            }
        }
    }
}

#[test]
fn an_update_ahead_has_the_same_bits_and_undone_leaves_none() {
    for n in [1, 7, 33, 1000, 2048, 70_001] {
        let reference = all_exchanges(&|s, states, e| adamw(Isa::Scalar, s, states, e), n);
        for (isa, threads) in Isa::available().flat_map(|isa| [(isa, 1), (isa, 3)]) {
            let workers = Workers::new(threads, "test").unwrap();
            let update =
                |s: &AdamScalars, mut states: States<'_>, mut e: Exchange<'_>, undo: bool| {
                    let bytes = match e {
                        Exchange::InPlaceF32(_) => 4,
                        Exchange::InPlaceBf16(_) | Exchange::InPlaceF16(_) => 2,
                        _ => 0,
                    };
                    // Whatever the room held.
                    let (mut log, mut grad) = (vec![0xa5; log_bytes(n)], vec![0x5a; n * bytes]);
                    let mut kept = Kept {
                        log: &mut log,
                        grad: &mut grad,
                    };
                    if undo {
                        // Any other scalars; the norm has not said which.
                        let guess = ADAM.at(3, 7.0 * ADAM.lr, 5.0);
                        let before = [&*states.master, &*states.m, &*states.v].map(<[f32]>::to_vec);
                        let (w, k) = (&workers, kept.reborrow());
                        adamw_ahead(w, isa, &guess, states.reborrow(), e.reborrow(), k);
                        let k = kept.reborrow();
                        adamw_undo(w, isa, &guess, states.reborrow(), e.reborrow(), k);
                        let after = [&*states.master, &*states.m, &*states.v].map(<[f32]>::to_vec);
                        let bits = |all: &[Vec<f32>; 3]| -> Vec<u32> {
                            all.iter().flatten().map(|x| x.to_bits()).collect()
                        };
                        assert!(bits(&before) == bits(&after), "{isa:?}, {n} elements");
                    }
                    let k = kept.reborrow();
                    let left = adamw_ahead(&workers, isa, s, states.reborrow(), e.reborrow(), k);
                    if left > 0 {
                        adamw_rest(&workers, isa, s, states, e, kept);
                    }
                };
            for undo in [false, true] {
                let bits = all_exchanges(&|s, states, e| update(s, states, e, undo), n);
                assert!(bits == reference, "{isa:?}, {n} elements, undone: {undo}");
            }
        }
    }
}

/// Of usual values next to nothing does not fit into the log; of those whose old values are lost in the new
/// ones nearly all.
#[test]
fn the_log_suffices_in_training_and_says_when_it_does_not() {
    let n = 1 << 18;
    let (_, mut rng) = fresh();
    let workers = Workers::new(2, "test").unwrap();
    let mut normal = |scale: f32| -> Vec<f32> {
        let sum =
            |rng: &mut ChaCha8Rng| (0..12).map(|_| rng.random_range(-0.5..0.5f32)).sum::<f32>();
        (0..n).map(|_| scale * sum(&mut rng)).collect()
    };
    let mut memory = Memory::new(&normal(0.02));
    let mut log = vec![0; log_bytes(n)];
    let mut ahead = |memory: &mut Memory, t: u64, grad: &[f32]| {
        let mut param = vec![0.0; n];
        let mut kept = Kept {
            log: &mut log,
            grad: &mut [],
        };
        let mut exchange = Exchange::F32 {
            grad,
            param: &mut param,
        };
        let (isa, s) = (Isa::best(), ADAM.at(t, ADAM.lr, 1.0));
        let (e, k) = (exchange.reborrow(), kept.reborrow());
        let left = adamw_ahead(&workers, isa, &s, memory.states(), e, k);
        adamw_rest(&workers, isa, &s, memory.states(), exchange, kept);
        left
    };
    for t in 1..=30 {
        let left = ahead(&mut memory, t, &normal(1e-4));
        // The first gradients are often large beside the moments, which know of few.
        assert!(left == 0 || t <= 3, "step {t}: {left}");
    }
    let left = ahead(&mut memory, 31, &normal(1e12));
    assert_eq!(left, n);
}

#[test]
fn an_unchanged_step_writes_the_parameter_and_nothing_else() {
    let master = [1.0f32, -2.5, 3e-40, f32::MAX];
    let mut memory = Memory {
        master: master.to_vec(),
        m: vec![0.5; 4],
        v: vec![0.25; 4],
    };
    let before = memory.bits();
    // Whatever the gradient holds: this is what a skipped step asks for.
    let mut both = [f32::NAN, f32::INFINITY, 0.0, 1.0];
    let exchange = Exchange::InPlaceF32(&mut both);
    adamw(
        Isa::best(),
        &AdamScalars::unchanged(),
        memory.states(),
        exchange,
    );
    assert_eq!((memory.bits(), both), (before, master));
}

#[test]
fn bf16_rounds_halves_up_for_every_upper_half_and_keeps_nan() {
    for upper in 0..=u16::MAX {
        for lower in [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
            let x = f32::from_bits(u32::from(upper) << 16 | lower);
            let y = round_to_bf16(x);
            if x.is_nan() {
                assert!(y.is_nan(), "{x:?}");
                continue;
            }
            // By the definition: the nearest of the two neighbours, the larger magnitude on a tie.
            let up = lower >= 0x8000;
            let wanted = bf16::from_bits(upper + u16::from(up));
            assert_eq!(y.to_bits(), wanted.to_bits(), "{:08x}", x.to_bits());
        }
    }
    let wide: Vec<f32> = (0..=u16::MAX)
        .map(|b| f32::from_bits(u32::from(b) << 16))
        .collect();
    let mut narrow = vec![bf16::ZERO; wide.len()];
    f32_to_bf16(&wide, &mut narrow);
    let mut back = vec![0.0; wide.len()];
    bf16_to_f32(&narrow, &mut back);
    let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
    assert!(wide.iter().zip(&back).all(same), "bf16 values survive");
}

/// By the definition: the `half` crate's own, in software and (where the machine has it) in hardware.
fn half_rounds(x: f32) -> [u16; 2] {
    [f16::from_f32_const(x).to_bits(), f16::from_f32(x).to_bits()]
}

#[test]
fn f16_widens_exactly_and_rounds_to_nearest_even_around_each_of_its_values() {
    let all: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
    let mut wide = vec![0.0; all.len()];
    f16_to_f32(&all, &mut wide);
    for (x, wide) in all.iter().zip(&wide) {
        assert_eq!(wide.to_bits(), x.to_f32_const().to_bits(), "{x:?}");
        assert_eq!(wide.to_bits(), widen_f16(*x).to_bits(), "{x:?}");
    }
    // Rounding never goes down where values go up, so that all of it is known from where it goes up: in the
    // middle between two neighbours, and the nearest f32 on either side.
    let mut tried = vec![f32::MIN_POSITIVE, 1e-45, f32::MAX, 65519.99, 65520.0];
    for (x, wide) in all.iter().zip(&wide).filter(|(x, _)| !x.is_nan()) {
        let up = f16::from_bits(x.to_bits() + 1).to_f32_const();
        let up = if up.is_infinite() { 65536.0 } else { up };
        let middle = wide + (up - wide) / 2.0;
        for at in [*wide, middle] {
            tried.extend([at, at.next_up(), at.next_down()]);
        }
    }
    tried.extend((0..1 << 20).map(|i: u32| f32::from_bits(i.wrapping_mul(4099))));
    let mut got = vec![f16::ZERO; tried.len()];
    f32_to_f16(&tried, &mut got);
    for (x, got) in tried.iter().zip(&got) {
        assert_eq!(half_rounds(*x), [got.to_bits(); 2], "{:08x}", x.to_bits());
        assert_eq!(round_to_f16(*x).to_bits(), got.to_bits());
    }
    // The comparison can fail: the rule of bf16 goes up where two values are equally near.
    let half_up = |x: f32| f16::from_f32_const(f32::from_bits(x.to_bits() + 0x1000));
    let tie = 1.0 + 0.5f32.powi(11);
    assert_ne!(half_up(tie).to_bits(), round_to_f16(tie).to_bits());
}

/// A 64th of them, or all where FOREBAY_EVERY_F32 is set: a minute of a release build.
#[test]
fn f32_values_of_every_size_round_to_f16_as_the_half_crate_has_it() {
    let step = match std::env::var_os("FOREBAY_EVERY_F32") {
        Some(_) => 1,
        None => 64,
    };
    let mut got = vec![f16::ZERO; 1 << 16];
    // Another place of each 64, so that mantissas differ from exponent to exponent.
    for (index, upper) in (0..=u16::MAX).step_by(step).enumerate() {
        let upper = upper + (index % step) as u16;
        let from: Vec<f32> = (0..=u16::MAX)
            .map(|lower| f32::from_bits(u32::from(upper) << 16 | u32::from(lower)))
            .collect();
        f32_to_f16(&from, &mut got);
        for (x, got) in from.iter().zip(&got) {
            assert_eq!(half_rounds(*x), [got.to_bits(); 2], "{:08x}", x.to_bits());
            assert_eq!(round_to_f16(*x).to_bits(), got.to_bits());
        }
    }
}

/// As `ten_steps_are_within_a_millionth_of_the_oracle_on_every_path`, gradients in f16.
#[test]
fn in_f16_too_ten_steps_are_within_a_millionth_of_the_oracle() {
    let (_, mut rng) = fresh();
    let n = 10_007;
    let master = values(&mut rng, n);
    let mut halves = vec![vec![f16::ZERO; n]; STEPS as usize];
    let mut grads = vec![vec![0.0; n]; STEPS as usize];
    for (half, grad) in halves.iter_mut().zip(&mut grads) {
        f32_to_f16(&values(&mut rng, n), half);
        f16_to_f32(half, grad);
    }
    let wanted = oracle(&ADAM, &master, &grads);
    for isa in Isa::available() {
        let (mut memory, mut param) = (Memory::new(&master), vec![f16::ZERO; n]);
        for (t, grad) in (1..).zip(&halves) {
            let exchange = Exchange::F16 {
                grad,
                param: &mut param,
            };
            adamw(isa, &ADAM.at(t, ADAM.lr, SCALE), memory.states(), exchange);
        }
        let error = error(&memory.master, &wanted);
        println!("{isa:?}: {error:.2e}");
        assert!(error <= 1e-6, "{isa:?}: {error:.2e}");
        for (p, master) in param.iter().zip(&memory.master) {
            assert_eq!(p.to_bits(), f16::from_f32(*master).to_bits());
        }
    }
}

#[test]
fn a_square_sum_in_f16_is_that_of_its_values() {
    let (_, mut rng) = fresh();
    let workers = Workers::new(2, "test").unwrap();
    let mut half = vec![f16::ZERO; 100_003];
    f32_to_f16(&values(&mut rng, half.len()), &mut half);
    let mut wide = vec![0.0; half.len()];
    f16_to_f32(&half, &mut wide);
    let sum = square_sum(&workers, NormIn::F16(&half)).sum;
    let wanted = square_sum(&workers, NormIn::F32(&wide)).sum;
    assert_eq!(sum.to_bits(), wanted.to_bits());
    // What is too large for f16 is seen.
    half[77] = round_to_f16(65520.0);
    assert!(!square_sum(&workers, NormIn::F16(&half)).finite());
}

#[test]
fn a_square_sum_is_right_finds_what_is_not_finite_and_does_not_depend_on_threads() {
    let (_, mut rng) = fresh();
    for n in [0, 1, 63, 4097, 100_003] {
        let mut values: Vec<f32> = (0..n).map(|_| value(&mut rng)).collect();
        let wanted: f64 = values.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
        let sums = |values: &[f32]| -> Vec<u64> {
            [1, 2, 5]
                .map(|threads| {
                    let workers = Workers::new(threads, "test").unwrap();
                    square_sum(&workers, NormIn::F32(values)).sum.to_bits()
                })
                .to_vec()
        };
        let got = sums(&values);
        assert!(got.iter().all(|s| *s == got[0]), "threads");
        let sum = f64::from_bits(got[0]);
        assert!((sum - wanted).abs() <= 1e-12 * wanted, "{sum} for {wanted}");
        if n > 0 {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let at = rng.random_range(0..n);
                let kept = std::mem::replace(&mut values[at], bad);
                assert!(!f64::from_bits(sums(&values)[0]).is_finite());
                values[at] = kept;
            }
        }
    }
}
