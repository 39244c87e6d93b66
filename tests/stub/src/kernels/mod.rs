//! What each kernel computes, by name: the one table to extend. Types come from the kernel's own
//! signature, so one entry serves `name`, `name_float`, `name_bf16`, `name_f16` and `name_64`; arguments are asked for by the
//! names that the CUDA source gives them.

mod arguments;
mod attention;
mod decoder;
mod optimizer;
mod optimizers;

pub(crate) use arguments::{Call, Result, bf16, f16, from_bf16, from_f16};

use crate::call::code;
use crate::machine::Fault;
use crate::source::Signature;

type Kernel = fn(&Call<'_>) -> Result<()>;

const TABLE: [(&str, Kernel); 32] = [
    ("adamw", optimizer::adamw),
    ("add", decoder::add),
    ("attention", attention::forward),
    ("attention_backward_kv", attention::backward_kv),
    ("attention_backward_q", attention::backward_q),
    ("attention_delta", attention::delta),
    ("attention_mma", attention::forward),
    ("attention_mma_backward_kv", attention::backward_kv),
    ("attention_mma_backward_q", attention::delta_and_backward_q),
    ("cast_f16_to_float", optimizer::cast),
    ("cast_to_bf16", optimizer::cast),
    ("cast_to_f16", optimizer::cast),
    ("cast_to_float", optimizer::cast),
    ("column_sums", decoder::column_sums),
    ("cross_entropy", decoder::cross_entropy),
    ("embedding", decoder::embedding),
    ("embedding_backward", decoder::embedding_backward),
    ("embedding_chains", decoder::embedding_chains),
    ("lamb_factor", optimizers::lamb_factor),
    ("lamb_move", optimizers::lamb_move),
    ("lamb_moments", optimizers::lamb_moments),
    ("poison", poison),
    ("rms_norm", decoder::rms_norm),
    ("rms_norm_backward", decoder::rms_norm_backward),
    ("rope", decoder::rope),
    ("scaled_sum", decoder::scaled_sum),
    ("slow_increment", slow_increment),
    ("square_sum", optimizer::square_sum),
    ("swiglu", decoder::swiglu),
    ("swiglu_backward", decoder::swiglu_backward),
    ("trap", trap),
    ("update", optimizers::update),
];

fn find(name: &str) -> Option<Kernel> {
    let mut name = name;
    loop {
        if let Some((_, kernel)) = TABLE.iter().find(|(known, _)| *known == name) {
            return Some(*kernel);
        }
        // Without its types and sizes.
        let (shorter, last) = name.rsplit_once('_')?;
        let sized = last.parse::<u32>().is_ok();
        if !(sized || ["float", "bf16", "f16"].contains(&last)) {
            return None;
        }
        name = shorter;
    }
}

pub(crate) fn known(name: &str) -> bool {
    find(name).is_some()
}

/// Runs a kernel.
pub(crate) fn run(signature: &Signature, values: Vec<Vec<u8>>, grid: [u32; 3]) -> Result<()> {
    let call = Call {
        signature,
        values,
        grid,
    };
    match find(&signature.name) {
        Some(kernel) => kernel(&call),
        None => Err(call.fault(code::NOT_FOUND, "is not in the table")),
    }
}

/// Of the tests of the devices.
fn slow_increment(call: &Call<'_>) -> Result<()> {
    let n = call.number("n")?;
    std::thread::sleep(std::time::Duration::from_nanos(
        call.number("nanoseconds")? as u64
    ));
    let x = call.floats("x", 0, n)?;
    call.put("x", 0, &x.iter().map(|x| x + 1.0).collect::<Vec<_>>())
}

/// Of the tests of skipped steps.
fn poison(call: &Call<'_>) -> Result<()> {
    call.put("x", 0, &[f32::INFINITY])
}

fn trap(call: &Call<'_>) -> Result<()> {
    Err(call.fault(code::ILLEGAL_INSTRUCTION, "trapped"))
}

/// One that fails the device.
impl Call<'_> {
    pub(crate) fn fault(&self, code: i32, what: &str) -> Fault {
        let what = format!("{}: {what}", self.signature.name);
        Fault { code, what }
    }
}
