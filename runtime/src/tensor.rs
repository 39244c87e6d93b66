//! Views of device memory: what operations take and leases give.
//!
//! A [`Tensor`] is a shape over a place on the device (or, of what a stage gathers from, in pinned memory
//! that operations can read), valid as long as the lease it came from; a [`TensorMut`] is one that may be
//! written. Neither owns memory, and neither can be read by the host: operations are queued on the
//! device's compute stream and run later, in order.

use std::fmt;
use std::marker::PhantomData;

use crate::device::Span;
use crate::error::{Error, Result};

/// The type of a tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DType {
    /// IEEE single precision, 4 bytes.
    F32,
    /// bfloat16, 2 bytes.
    Bf16,
    /// IEEE half precision, 2 bytes.
    F16,
    /// Unsigned 32-bit integers: token ids.
    U32,
}

impl DType {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 | Self::U32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "fp32",
            Self::Bf16 => "bf16",
            Self::F16 => "fp16",
            Self::U32 => "u32",
        })
    }
}

impl std::str::FromStr for DType {
    type Err = String;

    /// The types that a model can compute in.
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "fp32" | "f32" | "float32" => Ok(Self::F32),
            "bf16" | "bfloat16" => Ok(Self::Bf16),
            "fp16" | "f16" | "float16" | "half" => Ok(Self::F16),
            _ => Err(format!(
                "'{text}' is not a type to compute in: use bf16, fp16 or fp32"
            )),
        }
    }
}

/// Up to four dimensions, outermost first.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    dims: [usize; 4],
    rank: u8,
}

impl Shape {
    /// The dimensions, outermost first.
    pub fn dims(&self) -> &[usize] {
        &self.dims[..usize::from(self.rank)]
    }

    /// Product of the dimensions.
    pub fn elements(&self) -> usize {
        self.dims().iter().product()
    }
}

impl<const N: usize> From<[usize; N]> for Shape {
    /// # Panics
    /// For more than four dimensions, at compile time.
    fn from(dims: [usize; N]) -> Self {
        const { assert!(N <= 4, "a shape has at most four dimensions") };
        let mut shape = Self {
            dims: [1; 4],
            rank: N as u8,
        };
        shape.dims[..N].copy_from_slice(&dims);
        shape
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.dims())
    }
}

/// An address in device memory with a type and a shape; what travels into a launch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct View {
    pub(crate) address: u64,
    pub(crate) dtype: DType,
    pub(crate) shape: Shape,
}

impl View {
    pub(crate) fn span(&self) -> Span {
        Span {
            address: self.address,
            bytes: self.bytes(),
        }
    }

    pub(crate) fn bytes(&self) -> u64 {
        (self.shape.elements() * self.dtype.bytes()) as u64
    }
}

/// A read-only view of device memory, alive as long as its lease.
#[derive(Clone, Copy)]
pub struct Tensor<'a> {
    pub(crate) view: View,
    lease: PhantomData<&'a ()>,
}

/// A writable view of device memory, alive as long as its lease.
pub struct TensorMut<'a> {
    pub(crate) view: View,
    lease: PhantomData<&'a mut ()>,
}

impl<'a> Tensor<'a> {
    pub(crate) fn new(view: View) -> Self {
        Self {
            view,
            lease: PhantomData,
        }
    }

    /// Its shape.
    pub fn shape(&self) -> Shape {
        self.view.shape
    }

    /// The type of its elements.
    pub fn dtype(&self) -> DType {
        self.view.dtype
    }

    /// The same memory under another shape of as many elements.
    ///
    /// # Errors
    /// [`Error::Shape`] if the number of elements differs.
    pub fn reshape(&self, shape: impl Into<Shape>) -> Result<Tensor<'a>> {
        Ok(Tensor::new(reshaped(self.view, shape.into())?))
    }

    /// Rows `start..start + rows` of the outermost dimension.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are not as many rows.
    pub fn rows(&self, start: usize, rows: usize) -> Result<Tensor<'a>> {
        Ok(Tensor::new(rows_of(self.view, start, rows)?))
    }
}

impl TensorMut<'_> {
    pub(crate) fn new(view: View) -> Self {
        Self {
            view,
            lease: PhantomData,
        }
    }

    /// Its shape.
    pub fn shape(&self) -> Shape {
        self.view.shape
    }

    /// The type of its elements.
    pub fn dtype(&self) -> DType {
        self.view.dtype
    }

    /// The same place, to be read.
    pub fn as_ref(&self) -> Tensor<'_> {
        Tensor::new(self.view)
    }

    /// The same place, to be written, for a while: for handing it on and keeping it.
    pub fn reborrow(&mut self) -> TensorMut<'_> {
        TensorMut::new(self.view)
    }

    /// The same place for a while under another shape of as many elements.
    ///
    /// # Errors
    /// [`Error::Shape`] if the number of elements differs.
    pub fn reshape(&mut self, shape: impl Into<Shape>) -> Result<TensorMut<'_>> {
        Ok(TensorMut::new(reshaped(self.view, shape.into())?))
    }

    /// The rows before `row` and those from it on, each to be written for a while.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are not as many rows.
    pub fn split(&mut self, row: usize) -> Result<(TensorMut<'_>, TensorMut<'_>)> {
        let rest = self.view.shape.dims[0].saturating_sub(row);
        let before = rows_of(self.view, 0, row)?;
        let after = rows_of(self.view, row, rest)?;
        Ok((TensorMut::new(before), TensorMut::new(after)))
    }

    /// Rows `start..start + rows` of the outermost dimension, for a while.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are not as many rows.
    pub fn rows(&mut self, start: usize, rows: usize) -> Result<TensorMut<'_>> {
        Ok(TensorMut::new(rows_of(self.view, start, rows)?))
    }
}

fn reshaped(view: View, shape: Shape) -> Result<View> {
    if shape.elements() == view.shape.elements() {
        Ok(View { shape, ..view })
    } else {
        let what = format!("{:?} cannot be seen as {shape:?}", view.shape);
        Err(Error::Shape {
            operation: "reshape",
            what,
        })
    }
}

fn rows_of(view: View, start: usize, rows: usize) -> Result<View> {
    let mut shape = view.shape;
    let inside = start
        .checked_add(rows)
        .is_some_and(|end| end <= shape.dims[0]);
    if shape.rank == 0 || !inside {
        let what = format!("rows {start}..+{rows} of {:?}", view.shape);
        return Err(Error::Shape {
            operation: "rows",
            what,
        });
    }
    let row_bytes = view.bytes() / shape.dims[0].max(1) as u64;
    shape.dims[0] = rows;
    Ok(View {
        address: view.address + start as u64 * row_bytes,
        shape,
        ..view
    })
}

impl fmt::Debug for Tensor<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor {:?} {:?}", self.view.dtype, self.view.shape)
    }
}

impl fmt::Debug for TensorMut<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TensorMut {:?} {:?}", self.view.dtype, self.view.shape)
    }
}
