//! Optimizers on the device, with the bits of the CPU's.

use super::kernels::{Args, Element};
use super::ops::{Done, Queue, SQUARE_SUMS, adamw};
use crate::cpu::{Master, Moment, SQUARE_SUM_PIECES, Scalars, StateFormat, square_sum_strand};

/// Where the states of a run of elements are on the device, as a [`StateFormat`] keeps them: component after
/// component of a part, of which `first` is the run's first element.
#[derive(Clone, Copy, Debug)]
pub struct StatesAt {
    /// How they are kept.
    pub format: StateFormat,
    /// The address of the part's states.
    pub address: u64,
    /// Elements of the part.
    pub elements: u64,
    /// The first of the run.
    pub first: u64,
}

impl StatesAt {
    /// The addresses of master, rest, and each moment in f32 and in bf16; 0 for what is not kept.
    fn addresses(&self) -> [u64; 6] {
        let mut all = [0; 6];
        let format = self.format;
        let split = usize::from(format.master == Master::Split);
        all[split] = self.address + self.first * format.master_bytes();
        let narrow = usize::from(format.moment == Moment::Bf16);
        let bytes = format.moment.bytes();
        let moments = self.address + self.elements * format.master_bytes();
        for which in 0..u64::from(format.moments) {
            let start = moments + which * self.elements * bytes;
            all[2 + 2 * which as usize + narrow] = start + self.first * bytes;
        }
        all
    }
}

/// The rule and numbers of a step, as kernels take them.
#[derive(Clone, Copy)]
#[repr(C)]
struct Rule {
    rule: u32,
    numbers: [f32; 10],
}

/// The kernel of this name for gradients and parameters of these types.
macro_rules! of_types {
    ($name:literal, $grad:expr, $param:expr) => {
        match ($grad, $param) {
            (Element::F32, Element::F32) => concat!($name, "_float_float"),
            (Element::F32, Element::Bf16) => concat!($name, "_float_bf16"),
            (Element::F32, Element::F16) => concat!($name, "_float_f16"),
            (Element::Bf16, Element::F32) => concat!($name, "_bf16_float"),
            (Element::F16, Element::F32) => concat!($name, "_f16_float"),
            (Element::Bf16, Element::Bf16) => concat!($name, "_bf16_bf16"),
            (Element::F16, Element::F16) => concat!($name, "_f16_f16"),
            (Element::Bf16, Element::F16) | (Element::F16, Element::Bf16) => {
                unreachable!("a model has one type of two bytes")
            }
        }
    };
}

pub(super) use of_types;

/// Any optimizer on n elements with the bits of [`crate::cpu::update`]: the gradient's type is `grad.1`, the
/// parameter's the queue's. Of [`Scalars::Lamb`] they are a whole tensor, and `sums` is [`LAMB_SUMS`] bytes of memory
/// that is nobody else's until this has run.
///
/// # Safety
/// See [`add`](super::ops::add).
pub unsafe fn update(
    q: Queue<'_>,
    scalars: &Scalars,
    grad: (u64, Element),
    states: StatesAt,
    param: u64,
    n: usize,
    sums: u64,
) -> Done {
    let (rule, numbers) = scalars.words();
    if let (true, Some(adam)) = (states.format.plain(), scalars.adam()) {
        let [master, _, m, _, v, _] = states.addresses();
        // SAFETY: by the contract above.
        return unsafe { adamw(q, &adam, grad, [master, m, v], param, n) };
    }
    let optimizer = Rule { rule, numbers };
    let with_states = |args: Args| states.addresses().into_iter().fold(args, Args::with);
    let grid = q.kernels.blocks(n.div_ceil(4));
    let launch = |name, grid, shared, args: &mut Args| {
        // SAFETY: as the kernels take them, by the contract above.
        unsafe {
            q.kernels
                .launch(q.stream, (name, None), grid, [256, 1], shared, args)
        }
    };
    if !matches!(scalars, Scalars::Lamb(_)) {
        let name = of_types!("update", grad.1, q.element);
        let args = with_states(Args::new().with(optimizer).with(grad.0));
        return launch(name, grid, 0, &mut args.with(param).with(n as u64));
    }
    let name = of_types!("lamb_moments", grad.1, q.element);
    let args = with_states(Args::new().with(optimizer).with(grad.0)).with(param);
    let strand = square_sum_strand(n) as u64;
    let mut args = args.with(n as u64).with(strand).with(sums);
    let pieces = SQUARE_SUM_PIECES as u32;
    launch(name, [pieces, 1, 1], 0, &mut args)?;
    let mut args = Args::new().with(optimizer).with(sums).with(pieces);
    launch("lamb_factor", [1, 1, 1], LAMB_SUMS as u32, &mut args)?;
    let args = with_states(Args::new().with(optimizer));
    let mut args = args.with(param).with(n as u64).with(sums);
    let name = match q.element {
        Element::F32 => "lamb_move_float",
        Element::Bf16 => "lamb_move_bf16",
        Element::F16 => "lamb_move_f16",
    };
    launch(name, grid, 0, &mut args)
}

/// Bytes of the sums of [`update`] by LAMB: of masters and of directions.
pub const LAMB_SUMS: usize = 2 * SQUARE_SUMS;
