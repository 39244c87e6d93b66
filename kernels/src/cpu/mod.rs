//! Kernels for CPUs.

mod adam;
mod cast;
mod cores;
mod isa;
mod norm;
pub mod ops;
mod optim;
mod shared;
mod workers;

pub use adam::{
    AdamScalars, AdamW, Exchange, Kept, States, adam_traffic, adamw, adamw_ahead, adamw_parallel,
    adamw_rest, adamw_undo, log_bytes,
};
pub use cast::{
    bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16, round_to_bf16, round_to_f16, widen_f16,
};
pub use cores::{Binding, Cores, bind_this_thread};
pub use isa::Isa;
pub use norm::{NormIn, SquareSum, square_sum};
pub(crate) use norm::{PIECES as SQUARE_SUM_PIECES, strand_of as square_sum_strand};
pub use optim::{
    Adagrad, Lamb, Lion, Master, Moment, Optimizer, Scalars, Sgd, StateFormat, Stored, update,
    update_ahead, update_rest, update_undo,
};
pub use workers::{Shift, Workers};
