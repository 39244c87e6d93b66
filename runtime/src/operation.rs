//! How an operation reaches a device, built in or a user's own.
//!
//! An [`Operation`] is a small value (its sizes and constants) that knows how to run on each
//! device. [`Step::launch`](crate::Step::launch) hands it tensors, which arrive on the host device
//! as slices, in the order given. All of [`crate::ops`] is written this way; so is an operation of
//! your own:
//!
//! ```
//! use forebay::{HostArgs, HostContext, Operation};
//!
//! /// y = scale * x
//! #[derive(Clone, Copy)]
//! struct Scale(f32);
//!
//! impl Operation for Scale {
//!     fn name(&self) -> &'static str {
//!         "scale"
//!     }
//!     fn host(&self, _cx: &HostContext, mut args: HostArgs<'_>) -> Result<(), String> {
//!         let x = args.input::<f32>()?;
//!         let y = args.output::<f32>()?;
//!         for (y, x) in y.iter_mut().zip(x) {
//!             *y = self.0 * x;
//!         }
//!         Ok(())
//!     }
//! }
//! ```

use std::marker::PhantomData;
use std::mem::{MaybeUninit, align_of, size_of};

use forebay_kernels::cpu::{Workers, bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use forebay_kernels::cuda::ops::Queue;
use forebay_kernels::cuda::sys::CUstream;
use forebay_kernels::cuda::{self, Kernels};

use half::{bf16, f16};

use crate::device::Span;
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor, TensorMut, View};

/// Work on tensors, runnable on each device. A plain value: it is copied into the stream.
pub trait Operation: Copy + Send + 'static {
    /// Its name, for errors and traces.
    fn name(&self) -> &'static str;

    /// The output, by its place, that it can set instead of adding to it: a gradient of a weight, where
    /// nothing was added to it yet ([`CudaArgs::fresh`] and [`HostArgs::fresh`] say so then). Gradients that
    /// nobody sets are zeroed before they are added to.
    fn sets(&self) -> Option<usize> {
        None
    }

    /// Floating-point operations of its matrix products: by them a step's compute is foreseen
    /// ([`Footprint`](crate::Footprint)). Other work need not be counted.
    fn flops(&self) -> u64 {
        0
    }

    /// The input, by its place, that its host version takes in whatever type it has, where others of two
    /// bytes arrive as f32: a table of which it reads a few rows.
    fn takes_as_is(&self) -> Option<usize> {
        None
    }

    /// Runs on the host device, on the compute stream's thread.
    ///
    /// # Errors
    /// A sentence on why it cannot; the device is lost from there on.
    fn host(&self, cx: &HostContext, args: HostArgs<'_>) -> Result<(), String>;

    /// Queues it on the compute stream of a CUDA device, without waiting for it.
    ///
    /// # Errors
    /// As for [`Operation::host`]. What does not say how it runs there cannot.
    fn cuda(&self, cx: &CudaContext<'_>, args: CudaArgs<'_>) -> Result<(), String> {
        let _ = (cx, args);
        Err("it has no CUDA version; implement Operation::cuda, or use --device host".to_owned())
    }
}

impl DType {
    /// What CUDA kernels of this type are called by.
    pub(crate) fn element(self) -> cuda::Element {
        match self {
            Self::Bf16 => cuda::Element::Bf16,
            Self::F16 => cuda::Element::F16,
            Self::F32 | Self::U32 => cuda::Element::F32,
        }
    }
}

/// What a CUDA device offers to operations.
#[derive(Debug)]
pub struct CudaContext<'a> {
    /// The device's kernels.
    pub kernels: &'a Kernels,
    /// The compute stream.
    pub stream: CUstream,
}

impl<'a> CudaContext<'a> {
    /// Where operations of one type are queued.
    pub fn queue(&self, dtype: DType) -> Queue<'a> {
        Queue {
            kernels: self.kernels,
            stream: self.stream,
            element: dtype.element(),
        }
    }
}

/// A tensor of a launch on a CUDA device.
#[derive(Clone, Copy, Debug)]
pub struct DeviceSlice {
    /// Where it is, as kernels see it.
    pub address: u64,
    /// How long it is.
    pub elements: usize,
    /// Of what.
    pub dtype: DType,
}

/// The tensors of a launch as places in device memory, each handed out once, in order.
#[derive(Debug)]
pub struct CudaArgs<'a> {
    inputs: std::slice::Iter<'a, View>,
    outputs: std::slice::Iter<'a, View>,
    fresh: bool,
}

impl CudaArgs<'_> {
    /// Whether the output that [`Operation::sets`] names holds nothing yet, and must be set.
    pub fn fresh(&self) -> bool {
        self.fresh
    }

    /// The next input.
    ///
    /// # Errors
    /// If there is none left.
    pub fn input(&mut self) -> Result<DeviceSlice, String> {
        place(self.inputs.next(), "input")
    }

    /// The next output.
    ///
    /// # Errors
    /// If there is none left.
    pub fn output(&mut self) -> Result<DeviceSlice, String> {
        place(self.outputs.next(), "output")
    }
}

fn place(view: Option<&View>, what: &str) -> Result<DeviceSlice, String> {
    let view = view.ok_or_else(|| format!("takes one more {what} than it was given"))?;
    Ok(DeviceSlice {
        address: view.address,
        elements: view.shape.elements(),
        dtype: view.dtype,
    })
}

/// What the host device offers to operations.
#[derive(Debug)]
pub struct HostContext {
    /// The device's worker threads.
    pub workers: Workers,
}

/// An element type that tensors can hold.
pub trait Element: bytemuck::Pod {
    /// Its type tag.
    const DTYPE: DType;
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
}

impl Element for u32 {
    const DTYPE: DType = DType::U32;
}

impl Element for bf16 {
    const DTYPE: DType = DType::Bf16;
}

impl Element for f16 {
    const DTYPE: DType = DType::F16;
}

/// The tensors of a launch as slices, each handed out once, in order. Those of bf16 and f16 arrive as f32,
/// so that an operation is written once for every type; what it writes is rounded when it has run. One input
/// may be taken as it is: [`Operation::takes_as_is`].
#[derive(Debug)]
pub struct HostArgs<'a> {
    inputs: std::slice::Iter<'a, View>,
    outputs: std::slice::Iter<'a, View>,
    fresh: bool,
    memory: PhantomData<&'a mut [u8]>,
}

impl<'a> HostArgs<'a> {
    /// Whether the output that [`Operation::sets`] names holds nothing yet, and must be set.
    pub fn fresh(&self) -> bool {
        self.fresh
    }

    /// The next input.
    ///
    /// # Errors
    /// If there is none left or its type is another.
    pub fn input<T: Element>(&mut self) -> Result<&'a [T], String> {
        let view = typed::<T>(self.inputs.next(), "input")?;
        // SAFETY: `Launch::run_on_host`'s contract: the view is mapped, and no output overlaps it.
        // Slots are aligned to 256 bytes and views to their elements.
        Ok(unsafe { std::slice::from_raw_parts(view.address as *const T, view.shape.elements()) })
    }

    /// The next output.
    ///
    /// # Errors
    /// If there is none left or its type is another.
    pub fn output<T: Element>(&mut self) -> Result<&'a mut [T], String> {
        let view = typed::<T>(self.outputs.next(), "output")?;
        // SAFETY: as in `input`; outputs overlap nothing (checked at launch), and the iterator
        // gives each out once.
        Ok(
            unsafe {
                std::slice::from_raw_parts_mut(view.address as *mut T, view.shape.elements())
            },
        )
    }
}

fn typed<'v, T: Element>(view: Option<&'v View>, what: &str) -> Result<&'v View, String> {
    let view = view.ok_or_else(|| format!("takes one more {what} than it was given"))?;
    if view.dtype == T::DTYPE && view.address % align_of::<T>() as u64 == 0 {
        Ok(view)
    } else {
        Err(format!(
            "wants {:?} where the {what} is {:?}",
            T::DTYPE,
            view.dtype
        ))
    }
}

const PAYLOAD_WORDS: usize = 12;
const VIEWS: usize = 12;

/// An operation with its tensors, ready for a stream; all inline.
#[derive(Clone, Copy)]
pub(crate) struct Launch {
    payload: [MaybeUninit<u64>; PAYLOAD_WORDS],
    host: unsafe fn(*const u8, &HostContext, HostArgs<'_>) -> Result<(), String>,
    cuda: unsafe fn(*const u8, &CudaContext<'_>, CudaArgs<'_>) -> Result<(), String>,
    name: &'static str,
    views: [MaybeUninit<View>; VIEWS],
    inputs: u8,
    outputs: u8,
    /// Where bf16 and f16 tensors are widened for the host device's operations, if they are.
    room: Option<u64>,
    /// The input that is not.
    as_is: Option<u8>,
    /// The output that it can set, and whether it is to.
    sets: Option<u8>,
    fresh: bool,
    /// Whether it may write memory that was pinned.
    into_pinned: bool,
}

impl Launch {
    /// Checks that nothing written overlaps anything else and packs it all.
    pub(crate) fn new<O: Operation>(
        operation: O,
        inputs: &[Tensor<'_>],
        outputs: &[TensorMut<'_>],
    ) -> Result<Self> {
        const {
            assert!(
                size_of::<O>() <= PAYLOAD_WORDS * 8,
                "an operation's value is too large"
            );
            assert!(align_of::<O>() <= align_of::<u64>());
        }
        /// # Safety
        /// `payload` holds an `O`; the views of `args` are as `Launch::run_on_host` demands.
        unsafe fn host<O: Operation>(
            payload: *const u8,
            cx: &HostContext,
            args: HostArgs<'_>,
        ) -> Result<(), String> {
            // SAFETY: by the contract above; `O` is `Copy`.
            unsafe { payload.cast::<O>().read() }.host(cx, args)
        }
        /// # Safety
        /// `payload` holds an `O`; the views of `args` are as `Launch::queue_on_cuda` demands.
        unsafe fn cuda<O: Operation>(
            payload: *const u8,
            cx: &CudaContext<'_>,
            args: CudaArgs<'_>,
        ) -> Result<(), String> {
            // SAFETY: by the contract above; `O` is `Copy`.
            unsafe { payload.cast::<O>().read() }.cuda(cx, args)
        }
        let name = operation.name();
        if inputs.len() + outputs.len() > VIEWS {
            let what = format!("takes at most {VIEWS} tensors");
            return Err(Error::Shape {
                operation: name,
                what,
            });
        }
        let mut views = [MaybeUninit::uninit(); VIEWS];
        let all = inputs
            .iter()
            .map(|t| t.view)
            .chain(outputs.iter().map(|t| t.view));
        for (place, view) in views.iter_mut().zip(all) {
            place.write(view);
        }
        let mut launch = Self {
            payload: [MaybeUninit::uninit(); PAYLOAD_WORDS],
            host: host::<O>,
            cuda: cuda::<O>,
            name,
            views,
            inputs: inputs.len() as u8,
            outputs: outputs.len() as u8,
            room: None,
            as_is: operation.takes_as_is().map(|input| input as u8),
            sets: operation.sets().map(|output| output as u8),
            fresh: false,
            into_pinned: false,
        };
        // SAFETY: size and alignment were checked above.
        unsafe { launch.payload.as_mut_ptr().cast::<O>().write(operation) };
        launch.check_overlap()?;
        Ok(launch)
    }

    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    pub(crate) fn views(&self) -> impl Iterator<Item = &View> {
        self.slices().0.iter().chain(self.slices().1)
    }

    /// Lets it write memory that was pinned: for a few results, which the host waits for.
    pub(crate) fn into_pinned(mut self) -> Self {
        self.into_pinned = true;
        self
    }

    /// Whether all that it touches may be touched: outputs in the device's memory, inputs there or where
    /// `also` says.
    pub(crate) fn lies_in(&self, memory: Span, also: impl Fn(Span) -> bool) -> bool {
        let (inputs, outputs) = self.slices();
        let readable = |view: &View| memory.contains(view.span()) || also(view.span());
        let writable =
            |view: &View| memory.contains(view.span()) || self.into_pinned && also(view.span());
        inputs.iter().all(readable) && outputs.iter().all(writable)
    }

    /// The output that it can set, if that is exactly this place.
    pub(crate) fn can_set(&self, address: u64, bytes: u64) -> bool {
        let output = self
            .sets
            .and_then(|output| self.slices().1.get(usize::from(output)));
        output.is_some_and(|view| view.address == address && view.bytes() == bytes)
    }

    /// Has it set that output.
    pub(crate) fn set_fresh(&mut self) {
        self.fresh = true;
    }

    fn slices(&self) -> (&[View], &[View]) {
        let (inputs, outputs) = (usize::from(self.inputs), usize::from(self.outputs));
        // SAFETY: the first `inputs + outputs` views were written by `new`.
        let views = unsafe {
            std::slice::from_raw_parts(self.views.as_ptr().cast::<View>(), inputs + outputs)
        };
        views.split_at(inputs)
    }

    /// Whether its host version wants a tensor, by its place among all, in f32 where it is narrower.
    fn widens(&self, index: usize, view: &View) -> bool {
        is_narrow(view.dtype) && self.as_is.map(usize::from) != Some(index)
    }

    /// Floats that widening its tensors takes.
    pub(crate) fn wide_floats(&self) -> u64 {
        let narrow = self.views().enumerate().filter(|(i, v)| self.widens(*i, v));
        narrow.map(|(_, view)| wide_floats(view) as u64).sum()
    }

    /// Has them widened, from this address on.
    pub(crate) fn widen_in(&mut self, room: u64) {
        self.room = Some(room);
    }

    fn check_overlap(&self) -> Result<()> {
        let (inputs, outputs) = self.slices();
        let overlap = |a: &View, b: &View| {
            a.address < b.address + b.bytes() && b.address < a.address + a.bytes()
        };
        for (i, output) in outputs.iter().enumerate() {
            if inputs
                .iter()
                .chain(&outputs[i + 1..])
                .any(|other| overlap(output, other))
            {
                let what =
                    "an output overlaps another tensor; give it memory of its own".to_owned();
                return Err(Error::Shape {
                    operation: self.name,
                    what,
                });
            }
        }
        Ok(())
    }

    /// Runs it here and now.
    ///
    /// # Safety
    /// Every view is mapped memory of its size, and until this returns nobody else writes an input
    /// or touches an output or the room for widening.
    pub(crate) unsafe fn run_on_host(&self, cx: &HostContext) -> Result<(), String> {
        let Some(mut room) = self.room else {
            // SAFETY: by the contract above.
            return unsafe { self.run_as_it_is(cx) };
        };
        let mut wide = *self;
        let all = usize::from(self.inputs + self.outputs);
        for (index, view) in wide.views[..all].iter_mut().enumerate() {
            // SAFETY: the first `inputs + outputs` views were written by `new`.
            let view = unsafe { view.assume_init_mut() };
            if self.widens(index, view) {
                // SAFETY: the room has a place for each of them, which overlaps nothing.
                unsafe { widen(view, wide_slice(room, view)) };
                let floats = wide_floats(view) as u64;
                (view.address, view.dtype) = (room, DType::F32);
                room += 4 * floats;
            }
        }
        // SAFETY: by the contract above; the widened places are this call's own.
        unsafe { wide.run_as_it_is(cx)? };
        for (view, own) in wide.slices().1.iter().zip(self.slices().1) {
            if is_narrow(own.dtype) {
                // SAFETY: an output of this launch and its place in the room.
                unsafe { narrow(wide_slice(view.address, own), own) };
            }
        }
        Ok(())
    }

    /// # Safety
    /// As for [`Launch::run_on_host`].
    unsafe fn run_as_it_is(&self, cx: &HostContext) -> Result<(), String> {
        let (inputs, outputs) = self.slices();
        let args = HostArgs {
            inputs: inputs.iter(),
            outputs: outputs.iter(),
            fresh: self.fresh,
            memory: PhantomData,
        };
        // SAFETY: `new` stored the operation that `host` was made for; views by our contract.
        unsafe { (self.host)(self.payload.as_ptr().cast(), cx, args) }
    }

    /// Queues it on a CUDA stream.
    ///
    /// # Safety
    /// Every view is memory that kernels of the context's device reach, and until the stream has come
    /// past it nobody unordered with the stream writes an input or touches an output.
    pub(crate) unsafe fn queue_on_cuda(&self, cx: &CudaContext<'_>) -> Result<(), String> {
        let (inputs, outputs) = self.slices();
        let args = CudaArgs {
            inputs: inputs.iter(),
            outputs: outputs.iter(),
            fresh: self.fresh,
        };
        // SAFETY: `new` stored the operation that `cuda` was made for; views by our contract.
        unsafe { (self.cuda)(self.payload.as_ptr().cast(), cx, args) }
    }
}

/// Floats of a widened view; the next one begins aligned to 256 bytes.
fn wide_floats(view: &View) -> usize {
    view.shape.elements().next_multiple_of(64)
}

/// Whether the host device's operations take f32 in its place.
fn is_narrow(dtype: DType) -> bool {
    match dtype {
        DType::Bf16 | DType::F16 => true,
        DType::F32 | DType::U32 => false,
    }
}

/// # Safety
/// A view of mapped memory of a narrow type, which nobody writes until this returns.
unsafe fn widen(view: &View, to: &mut [f32]) {
    let elements = view.shape.elements();
    // SAFETY: by the contract above.
    unsafe {
        match view.dtype {
            DType::F16 => f16_to_f32(
                std::slice::from_raw_parts(view.address as *const f16, elements),
                to,
            ),
            _ => bf16_to_f32(
                std::slice::from_raw_parts(view.address as *const bf16, elements),
                to,
            ),
        }
    }
}

/// # Safety
/// A view of mapped memory of a narrow type, which nobody else touches until this returns.
unsafe fn narrow(from: &[f32], view: &View) {
    let elements = view.shape.elements();
    // SAFETY: by the contract above.
    unsafe {
        match view.dtype {
            DType::F16 => f32_to_f16(
                from,
                std::slice::from_raw_parts_mut(view.address as *mut f16, elements),
            ),
            _ => f32_to_bf16(
                from,
                std::slice::from_raw_parts_mut(view.address as *mut bf16, elements),
            ),
        }
    }
}

/// # Safety
/// Mapped memory for a float an element of the view, which nobody else touches as long as the slice
/// lives.
unsafe fn wide_slice<'a>(address: u64, view: &View) -> &'a mut [f32] {
    // SAFETY: by the contract above.
    unsafe { std::slice::from_raw_parts_mut(address as *mut f32, view.shape.elements()) }
}
