//! Llama-type and Qwen3-type decoders on Forebay's public API: RMSNorm, rotary positions, grouped
//! heads, optional QK-norm, SwiGLU, a tied or an own head; forward and hand-written backward with
//! recomputation from a checkpoint of each layer, or of each n-th. Safe code throughout.
//!
//! A [`Decoder`] knows the model's sections and the stages of a step, and queues the operations of
//! each; where anything lives is the runtime's business.
#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod config;
mod decoder;
mod layer;
mod presets;
mod stages;

pub use config::{Config, ConfigError, Family};
pub use decoder::{Batch, Decoder, Observer, Positions};
