//! Llama shapes by size, for runs that need a size and no model in particular.

use crate::config::{Config, Family};

/// Name, hidden, intermediate, layers, heads of 128 (64 in the smaller ones), tied.
type Shape = (&'static str, usize, usize, usize, usize, bool);

const SHAPES: [Shape; 7] = [
    ("125m", 768, 2048, 12, 12, true),
    ("350m", 1024, 2816, 24, 16, true),
    ("1.3b", 2048, 5504, 24, 16, true),
    ("3b", 3072, 8192, 26, 24, true),
    ("7b", 4096, 11008, 32, 32, false),
    ("10b", 4096, 11008, 50, 32, false),
    ("13b", 5120, 13824, 40, 40, false),
];

/// The vocabulary of all: GPT-2's, padded to what tensor cores like.
const VOCABULARY: usize = 50304;

impl Config {
    /// The Llama of a size: 125m, 350m, 1.3b, 3b, 7b, 10b or 13b.
    pub fn preset(name: &str) -> Option<Self> {
        let shape = SHAPES.iter().find(|shape| shape.0 == name)?;
        let (_, hidden, intermediate, layers, heads, tied) = *shape;
        Some(Self {
            family: Family::Llama,
            hidden,
            intermediate,
            layers,
            heads,
            kv_heads: heads,
            head_dim: hidden / heads,
            vocabulary: VOCABULARY,
            eps: 1e-5,
            theta: 10_000.0,
            tied,
            init: 0.02,
        })
    }

    /// The names that [`Config::preset`] knows.
    pub fn presets() -> impl Iterator<Item = &'static str> {
        SHAPES.iter().map(|shape| shape.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Decoder;

    #[test]
    fn presets_are_as_large_as_their_names_say() {
        for (name, billions) in [
            ("125m", 0.1237),
            ("350m", 0.3615),
            ("1.3b", 1.3170),
            ("3b", 3.1),
            ("7b", 6.9),
            ("10b", 10.5),
            ("13b", 13.2),
        ] {
            let config = Config::preset(name).unwrap();
            let parameters = Decoder::new(config, 1, 8).unwrap().model().parameters() as f64;
            let ratio = parameters / 1e9 / billions;
            assert!((0.98..1.02).contains(&ratio), "{name}: {parameters}");
        }
        assert!(Config::preset("2b").is_none());
        assert_eq!(Config::presets().count(), 7);
    }
}
