//! Linear layers without bias: the forward product and the two of the backward pass.
//!
//! The result is cut into fixed tiles, each computed by one thread with the `gemm` crate.

use crate::cpu::Workers;
use crate::cpu::shared::Shared;

/// Rows and columns of a tile of the result: large enough that packing the factors is a small
/// part of the work, small enough that few threads share it evenly.
const TILE_ROWS: usize = 128;
const TILE_COLS: usize = 256;

/// A factor of a product: its address and the strides between its rows and columns.
#[derive(Clone, Copy)]
pub(super) struct Matrix {
    pub(super) start: *const f32,
    pub(super) row_stride: usize,
    pub(super) col_stride: usize,
}

// SAFETY: an address; who reads and writes when is said where it is used.
unsafe impl Sync for Matrix {}

impl Matrix {
    pub(super) fn rows(slice: &[f32], cols: usize) -> Self {
        Self {
            start: slice.as_ptr(),
            row_stride: cols,
            col_stride: 1,
        }
    }

    pub(super) fn transposed(self) -> Self {
        Self {
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    /// # Safety
    /// The element exists.
    unsafe fn at(self, row: usize, col: usize) -> *const f32 {
        // SAFETY: by the contract above.
        unsafe {
            self.start
                .add(row * self.row_stride + col * self.col_stride)
        }
    }
}

/// `out = scale * a·b`, or `out += scale * a·b`, on this thread; `a` is m × k and `b` k × n.
///
/// # Safety
/// `a` and `b` are readable for their sizes, and `out`, m × n with `out_stride` elements between
/// rows, is writable and overlaps neither.
pub(super) unsafe fn product(
    (m, n, k): (usize, usize, usize),
    out: *mut f32,
    out_stride: usize,
    add: bool,
    a: Matrix,
    b: Matrix,
    scale: f32,
) {
    // SAFETY: by the contract above.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out,
            1,
            out_stride as isize,
            add,
            a.start,
            a.col_stride as isize,
            a.row_stride as isize,
            b.start,
            b.col_stride as isize,
            b.row_stride as isize,
            1.0,
            scale,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// `out (+)= a·b` with `out` m × n, dense, tile by tile.
fn tiled(
    workers: &Workers,
    (m, n, k): (usize, usize, usize),
    out: &mut [f32],
    add: bool,
    a: Matrix,
    b: Matrix,
) {
    assert_eq!(
        out.len(),
        m * n,
        "the result of a product has its rows times columns"
    );
    let (down, across) = (m.div_ceil(TILE_ROWS), n.div_ceil(TILE_COLS));
    let out = Shared::new(out);
    workers.run(down * across, &|tile, _| {
        let rows = super::piece(tile / across, TILE_ROWS, m);
        let cols = super::piece(tile % across, TILE_COLS, n);
        // SAFETY: factors are slices of k columns and rows (asserted by the callers); tiles of
        // the result do not overlap.
        unsafe {
            let a = Matrix {
                start: a.at(rows.start, 0),
                ..a
            };
            let b = Matrix {
                start: b.at(0, cols.start),
                ..b
            };
            let out = out.at(rows.start * n + cols.start);
            product((rows.len(), cols.len(), k), out, n, add, a, b, 1.0);
        }
    });
}

/// `y = x · weightᵀ`: x is `[t, k]`, weight `[n, k]`, y `[t, n]`.
pub fn linear(
    w: &Workers,
    (t, n, k): (usize, usize, usize),
    x: &[f32],
    weight: &[f32],
    y: &mut [f32],
) {
    assert_eq!(
        (x.len(), weight.len()),
        (t * k, n * k),
        "sizes of a linear layer"
    );
    tiled(
        w,
        (t, n, k),
        y,
        false,
        Matrix::rows(x, k),
        Matrix::rows(weight, k).transposed(),
    );
}

/// `dx = dy · weight`, or added to `dx`: dy is `[t, n]`, weight `[n, k]`, dx `[t, k]`.
pub fn linear_dx(
    w: &Workers,
    (t, n, k): (usize, usize, usize),
    dy: &[f32],
    weight: &[f32],
    dx: &mut [f32],
    add: bool,
) {
    assert_eq!(
        (dy.len(), weight.len()),
        (t * n, n * k),
        "sizes of a linear layer"
    );
    tiled(
        w,
        (t, k, n),
        dx,
        add,
        Matrix::rows(dy, n),
        Matrix::rows(weight, k),
    );
}

/// `dweight += dyᵀ · x`: x is `[t, k]`, dy `[t, n]`, dweight `[n, k]`.
pub fn linear_dw(
    w: &Workers,
    (t, n, k): (usize, usize, usize),
    x: &[f32],
    dy: &[f32],
    dweight: &mut [f32],
) {
    assert_eq!(
        (x.len(), dy.len()),
        (t * k, t * n),
        "sizes of a linear layer"
    );
    tiled(
        w,
        (n, k, t),
        dweight,
        true,
        Matrix::rows(dy, n).transposed(),
        Matrix::rows(x, k),
    );
}
