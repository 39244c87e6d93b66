//! The f64 oracle, itself checked: against finite differences, and against transformers.
#![allow(clippy::unwrap_used)]

mod fixtures;
mod oracle;

use oracle::{IGNORED, Outcome, Shape, Tensors, distance, run};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn shapes() -> [Shape; 3] {
    let shape = Shape {
        hidden: 6,
        intermediate: 10,
        layers: 2,
        heads: 2,
        kv_heads: 1,
        head_dim: 4,
        vocabulary: 11,
        eps: 1e-5,
        theta: 100.0,
        tied: false,
        qk_norm: false,
    };
    let qwen = Shape {
        qk_norm: true,
        tied: true,
        ..shape.clone()
    };
    let many = Shape {
        heads: 4,
        kv_heads: 2,
        head_dim: 2,
        qk_norm: true,
        ..shape.clone()
    };
    [shape, qwen, many]
}

fn random(shape: &Shape, rng: &mut ChaCha8Rng) -> Tensors {
    let mut tensor = |(name, size): (String, usize)| {
        let center = if name.contains("norm") { 1.0 } else { 0.0 };
        (
            name,
            (0..size)
                .map(|_| center + rng.random_range(-0.5..0.5))
                .collect(),
        )
    };
    shape.tensors().into_iter().map(&mut tensor).collect()
}

/// The derivative of the loss along `direction` of one tensor, by central differences.
fn slope(
    shape: &Shape,
    weights: &Tensors,
    name: &str,
    direction: &[f64],
    ids: &[u32],
    targets: &[u32],
) -> f64 {
    let loss = |sign: f64| {
        let mut moved = weights.clone();
        let tensor = moved.get_mut(name).unwrap();
        tensor
            .iter_mut()
            .zip(direction)
            .for_each(|(w, d)| *w += sign * 1e-5 * d);
        run(shape, &moved, ids, targets, 5).loss
    };
    (loss(1.0) - loss(-1.0)) / 2e-5
}

#[test]
fn gradients_agree_with_finite_differences_in_random_directions() {
    let seed = std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
    println!("seed {seed}");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    for shape in shapes() {
        let weights = random(&shape, &mut rng);
        let ids: Vec<u32> = (0..10).map(|_| rng.random_range(0..11)).collect();
        let mut targets: Vec<u32> = (0..10).map(|_| rng.random_range(0..11)).collect();
        targets[3] = IGNORED;
        let Outcome { grads, .. } = run(&shape, &weights, &ids, &targets, 5);
        for (name, grad) in &grads {
            let direction: Vec<f64> = grad.iter().map(|_| rng.random_range(-1.0..1.0)).collect();
            let expected = slope(&shape, &weights, name, &direction, &ids, &targets);
            let along =
                |grad: &[f64]| -> f64 { grad.iter().zip(&direction).map(|(g, d)| g * d).sum() };
            let scale = grad.iter().map(|g| g.abs()).sum::<f64>().max(1e-6);
            let error = |grad: &[f64]| (along(grad) - expected).abs() / scale;
            assert!(
                error(grad) < 1e-5,
                "{name}: {} against {expected}",
                along(grad)
            );
            // Planted: a gradient a hundredth too large must be caught along most directions.
            let steep: Vec<f64> = grad.iter().map(|g| g.signum()).collect();
            let planted: f64 = grad.iter().zip(&steep).map(|(g, s)| 1.01 * g * s).sum();
            let truth = slope(&shape, &weights, name, &steep, &ids, &targets);
            assert!(
                (planted - truth).abs() / scale > 1e-5,
                "{name}: a planted error passes"
            );
        }
    }
}

#[test]
fn logits_loss_and_gradients_agree_with_transformers() {
    for fixture in fixtures::all() {
        let outcome = run(
            &fixture.shape,
            &fixture.weights,
            &fixture.ids,
            &fixture.targets,
            fixture.seq,
        );
        let close = |name: &str, got: &[f64], wanted: &[f64]| {
            let error = distance(got, wanted);
            assert!(
                error < 1e-5,
                "{}: {name} differs by {error:.2e}",
                fixture.name
            );
        };
        close("logits", &outcome.logits, &fixture.logits);
        close("loss", &[outcome.loss], &[fixture.loss]);
        assert_eq!(outcome.grads.len(), fixture.grads.len());
        for (name, grad) in &fixture.grads {
            close(name, &outcome.grads[name], grad);
        }
    }
}
