//! Where a new model's weights come from.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

use crate::error::Result;
use crate::model::{Init, Section, TensorSpec};

/// A source of first weights, asked section by section, tensor by tensor, in order: the model is
/// never in host memory twice.
pub trait Weights {
    /// Fills `out`, one f32 an element of the tensor, row-major.
    ///
    /// # Errors
    /// Whatever keeps the source from it; opening the trainer fails with it.
    fn fill(&mut self, section: &Section, tensor: &TensorSpec, out: &mut [f32]) -> Result<()>;
}

/// Weights as each tensor's [`Init`] says. A tensor's values depend on the seed and on its names
/// alone, not on what else there is.
#[derive(Clone, Copy, Debug)]
pub struct RandomInit {
    /// The run's seed.
    pub seed: u64,
}

impl Weights for RandomInit {
    fn fill(&mut self, section: &Section, tensor: &TensorSpec, out: &mut [f32]) -> Result<()> {
        match tensor.init {
            Init::Constant(value) => out.fill(value),
            Init::Normal(deviation) => {
                let stream = stream_of(section.name(), &tensor.name);
                let threads = std::thread::available_parallelism().map_or(1, usize::from);
                let each = out.len().div_ceil(PIECE).div_ceil(threads).max(1);
                let this = *self;
                std::thread::scope(|scope| {
                    for (share, out) in (0..).zip(out.chunks_mut(each * PIECE)) {
                        let first = stream.wrapping_add(share * each as u64);
                        scope.spawn(move || {
                            for (index, piece) in (0..).zip(out.chunks_mut(PIECE)) {
                                this.normal(first.wrapping_add(index), deviation, piece);
                            }
                        });
                    }
                });
            }
        }
        Ok(())
    }
}

/// Elements that have a stream of random numbers of their own.
const PIECE: usize = 1 << 18;

impl RandomInit {
    fn normal(&self, stream: u64, deviation: f32, out: &mut [f32]) {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(stream);
        for value in out {
            let normal: f32 = StandardNormal.sample(&mut rng);
            *value = deviation * normal;
        }
    }
}

/// FNV-1a of both names: the same on every machine and in every version.
fn stream_of(section: &str, tensor: &str) -> u64 {
    crate::model::fnv([section.as_bytes(), tensor.as_bytes()])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tensor_starts_the_same_wherever_it_stands() {
        let normal = Init::Normal(0.5);
        let one = Section::new("a").tensor("w", [100], normal);
        let two = Section::new("a")
            .tensor("v", [7], normal)
            .tensor("w", [100], normal);
        let fill = |section: &Section, index: usize, seed| {
            let mut out = vec![0.0; section.tensors()[index].shape.elements()];
            RandomInit { seed }
                .fill(section, &section.tensors()[index], &mut out)
                .unwrap();
            out
        };
        assert_eq!(fill(&one, 0, 1), fill(&two, 1, 1));
        assert_ne!(fill(&one, 0, 1), fill(&one, 0, 2));
        assert_ne!(fill(&two, 0, 1)[..], fill(&two, 1, 1)[..7]);
        let deviation = {
            let v = fill(&one, 0, 3);
            (v.iter().map(|x| x * x).sum::<f32>() / v.len() as f32).sqrt()
        };
        assert!((0.35..0.65).contains(&deviation), "{deviation}");
    }
}
