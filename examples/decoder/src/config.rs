//! Hugging Face's `config.json`, as far as these decoders go; what they cannot compute is refused.

use std::path::{Path, PathBuf};

use serde::Deserialize;

/// A kind of decoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// `model_type: llama`.
    Llama,
    /// `model_type: qwen3`: a norm on each head of queries and keys.
    Qwen3,
}

/// The shape of a decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Which kind.
    pub family: Family,
    /// Elements of a token's state.
    pub hidden: usize,
    /// Elements inside the MLP.
    pub intermediate: usize,
    /// Layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocabulary: usize,
    /// Of the norms.
    pub eps: f32,
    /// Base of the rotary wavelengths.
    pub theta: f64,
    /// Whether the classifier is the embedding.
    pub tied: bool,
    /// Standard deviation of first weights.
    pub init: f32,
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not JSON, or fields missing or of the wrong type.
    #[error("config.json: {0}")]
    Json(#[from] serde_json::Error),
    /// A value that these decoders do not compute.
    #[error("config.json: {field} is {value}; {supported}")]
    Unsupported {
        /// The field.
        field: &'static str,
        /// Its value.
        value: String,
        /// What would do.
        supported: &'static str,
    },
}

/// No size in a configuration may be larger: far above real models, far below overflow.
const SIZE_MAX: usize = 1 << 24;

#[derive(Deserialize)]
struct Raw {
    model_type: String,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: usize,
    #[serde(default = "default_eps")]
    rms_norm_eps: f32,
    rope_theta: Option<f64>,
    rope_parameters: Option<Rope>,
    rope_scaling: Option<Rope>,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    #[serde(default)]
    use_sliding_window: bool,
    hidden_act: Option<String>,
    #[serde(default = "default_init")]
    initializer_range: f32,
}

#[derive(Deserialize)]
struct Rope {
    rope_theta: Option<f64>,
    #[serde(alias = "type")]
    rope_type: Option<String>,
}

fn default_eps() -> f32 {
    1e-6
}

fn default_init() -> f32 {
    0.02
}

impl Config {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// [`ConfigError`], each naming the field and what would do.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::File {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&text)
    }

    /// Parses the text of a `config.json`.
    ///
    /// # Errors
    /// [`ConfigError`], each naming the field and what would do.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let raw: Raw = serde_json::from_str(text)?;
        let family = match raw.model_type.as_str() {
            "llama" => Family::Llama,
            "qwen3" => Family::Qwen3,
            other => return unsupported("model_type", other, "use llama or qwen3"),
        };
        raw.check()?;
        let (hidden, heads) = (raw.hidden_size, raw.num_attention_heads);
        let rope = raw.rope_parameters.as_ref().or(raw.rope_scaling.as_ref());
        let config = Self {
            family,
            hidden,
            intermediate: raw.intermediate_size,
            layers: raw.num_hidden_layers,
            heads,
            kv_heads: raw.num_key_value_heads.unwrap_or(heads),
            head_dim: raw
                .head_dim
                .unwrap_or(hidden.checked_div(heads).unwrap_or(0)),
            vocabulary: raw.vocab_size,
            eps: raw.rms_norm_eps,
            theta: rope
                .and_then(|r| r.rope_theta)
                .or(raw.rope_theta)
                .unwrap_or(10_000.0),
            tied: raw.tie_word_embeddings,
            init: raw.initializer_range,
        };
        config.check_sizes()?;
        Ok(config)
    }

    /// A small Llama for bytes: what `train` uses when it is given none.
    pub fn byte_level() -> Self {
        Self {
            family: Family::Llama,
            hidden: 128,
            intermediate: 384,
            layers: 9,
            heads: 4,
            kv_heads: 2,
            head_dim: 32,
            vocabulary: 256,
            eps: 1e-5,
            theta: 10_000.0,
            tied: false,
            init: 0.05,
        }
    }

    fn check_sizes(&self) -> Result<(), ConfigError> {
        let sizes = [
            ("hidden_size", self.hidden),
            ("intermediate_size", self.intermediate),
            ("num_hidden_layers", self.layers),
            ("num_attention_heads", self.heads),
            ("num_key_value_heads", self.kv_heads),
            ("head_dim", self.head_dim),
            ("vocab_size", self.vocabulary),
        ];
        if let Some((field, value)) = sizes.into_iter().find(|(_, v)| *v == 0 || *v > SIZE_MAX) {
            return unsupported(field, value, "use a size from 1 to 16777216");
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let field = "num_key_value_heads";
            return unsupported(field, self.kv_heads, "it must divide num_attention_heads");
        }
        if !self.head_dim.is_multiple_of(2) {
            return unsupported(
                "head_dim",
                self.head_dim,
                "rotary positions need an even one",
            );
        }
        if !(self.theta.is_finite() && self.theta > 0.0) {
            return unsupported("rope_theta", self.theta, "it must be above 0");
        }
        if !(self.eps.is_finite() && self.eps > 0.0) {
            return unsupported("rms_norm_eps", self.eps, "it must be above 0");
        }
        if !(self.init.is_finite() && self.init >= 0.0) {
            return unsupported("initializer_range", self.init, "it must not be negative");
        }
        Ok(())
    }
}

impl Raw {
    fn check(&self) -> Result<(), ConfigError> {
        for rope in self.rope_parameters.iter().chain(&self.rope_scaling) {
            if let Some(kind) = rope.rope_type.as_deref().filter(|k| *k != "default") {
                return unsupported(
                    "rope_type",
                    kind,
                    "only the default, unscaled RoPE is computed",
                );
            }
        }
        if self.attention_bias || self.mlp_bias {
            return unsupported(
                "attention_bias or mlp_bias",
                true,
                "layers here have no biases",
            );
        }
        if self.use_sliding_window {
            return unsupported(
                "use_sliding_window",
                true,
                "attention here is over the whole past",
            );
        }
        match self.hidden_act.as_deref() {
            None | Some("silu" | "swish") => Ok(()),
            Some(other) => unsupported("hidden_act", other, "use silu"),
        }
    }
}

fn unsupported<T>(
    field: &'static str,
    value: impl ToString,
    supported: &'static str,
) -> Result<T, ConfigError> {
    Err(ConfigError::Unsupported {
        field,
        value: value.to_string(),
        supported,
    })
}
