//! Forebay's numbers: what computes, and owns no memory.
//!
//! [`cpu`] holds AdamW in one pass, casts, norms and the operations of decoder models for the
//! host device, each over plain slices, spread over [`cpu::Workers`]. Results have the same bits
//! for every number of threads, every instruction set and every chunking. [`cuda`] holds the same
//! operations for a GPU.
#![deny(missing_docs)]

pub mod cpu;
pub mod cuda;
mod error;

pub use error::KernelError;
