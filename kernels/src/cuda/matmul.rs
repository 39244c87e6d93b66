//! Matrix products through cuBLASLt: one algorithm a shape, chosen at its first use and kept.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::c_void;

use cudarc::cublaslt::{result, sys};

use super::error::CudaError;
use super::kernels::{Element, Kernels};

/// Bytes of device memory that a product of these sizes, in any order, is given to work in.
pub(super) const fn workspace((rows, columns, inner): (usize, usize, usize)) -> usize {
    let bytes = 8 * (rows * columns + rows * inner + columns * inner);
    if bytes < 64 << 10 {
        64 << 10
    } else if bytes < 32 << 20 {
        bytes.next_multiple_of(256)
    } else {
        32 << 20
    }
}

/// A row-major product `d = alpha a·b + beta d`, where either side may be transposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Product {
    /// Rows and columns of d, and the length of the sums.
    pub(super) size: (usize, usize, usize),
    /// Whether a is stored `[inner, rows]`, and b `[columns, inner]`.
    pub(super) transposed: (bool, bool),
    /// Elements from one stored row to the next, of a, b and d.
    pub(super) pitch: (usize, usize, usize),
    /// Types of a and b, and of d.
    pub(super) element: Element,
    pub(super) result: Element,
    /// Whether d is added to.
    pub(super) add: bool,
}

/// What a product is described by; a plan that fails half way gives back what it has.
struct Descriptor(sys::cublasLtMatmulDesc_t);

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: made by `plan`, destroyed once.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

struct Layout(sys::cublasLtMatrixLayout_t);

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: made by `plan`, destroyed once.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

struct Preference(sys::cublasLtMatmulPreference_t);

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: made by `plan`, destroyed once.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

struct Planned {
    desc: Descriptor,
    layouts: [Layout; 3],
    algo: sys::cublasLtMatmulAlgo_t,
}

pub(super) struct Blas {
    handle: sys::cublasLtHandle_t,
    plans: RefCell<HashMap<(Product, [u32; 3]), Planned>>,
}

fn failed(what: impl Into<String>) -> impl FnOnce(result::CublasError) -> CudaError {
    let what = what.into();
    move |error| CudaError::Blas {
        what,
        status: format!("{:?}", error.0),
    }
}

fn data_type(element: Element) -> sys::cudaDataType {
    match element {
        Element::F32 => sys::cudaDataType::CUDA_R_32F,
        Element::Bf16 => sys::cudaDataType::CUDA_R_16BF,
        Element::F16 => sys::cudaDataType::CUDA_R_16F,
    }
}

/// To what an address is aligned, up to 256: the algorithm depends on it.
fn alignment(address: u64) -> u32 {
    1 << address.trailing_zeros().min(8)
}

impl Blas {
    pub(super) fn new() -> Result<Self, CudaError> {
        Ok(Self {
            handle: result::create_handle().map_err(failed("creating a handle"))?,
            plans: RefCell::default(),
        })
    }

    fn plan(&self, p: &Product, alignments: [u32; 3]) -> Result<Planned, CudaError> {
        use sys::cublasLtMatmulDescAttributes_t as Desc;
        use sys::cublasLtMatmulPreferenceAttributes_t as Pref;
        let error = || failed(format!("{p:?}"));
        let (rows, columns, inner) = p.size;
        // cuBLASLt thinks in columns: dᵀ = bᵀ·aᵀ, and a stored row is a column to it.
        let stored = |first: usize, second: usize, flip: bool| {
            if flip {
                (second, first)
            } else {
                (first, second)
            }
        };
        let b = stored(columns, inner, p.transposed.1);
        let a = stored(inner, rows, p.transposed.0);
        let layout = |element, (rows, cols): (usize, usize), pitch: usize| {
            let made = result::create_matrix_layout(
                data_type(element),
                rows as u64,
                cols as u64,
                pitch as i64,
            );
            made.map(Layout).map_err(error())
        };
        let layouts = [
            layout(p.element, b, p.pitch.1)?,
            layout(p.element, a, p.pitch.0)?,
            layout(p.result, (columns, rows), p.pitch.2)?,
        ];
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let desc =
            result::create_matmul_desc(compute, sys::cudaDataType::CUDA_R_32F).map_err(error())?;
        let desc = Descriptor(desc);
        let preference = Preference(result::create_matmul_pref().map_err(error())?);
        // SAFETY: descriptors that were just made, and values as long as is said.
        let algo = unsafe {
            for (which, flip) in [
                (Desc::CUBLASLT_MATMUL_DESC_TRANSA, p.transposed.1),
                (Desc::CUBLASLT_MATMUL_DESC_TRANSB, p.transposed.0),
            ] {
                let value = i32::from(flip);
                result::set_matmul_desc_attribute(desc.0, which, (&raw const value).cast(), 4)
                    .map_err(error())?;
            }
            let set = |which, value: *const c_void, bytes| {
                result::set_matmul_pref_attribute(preference.0, which, value, bytes)
                    .map_err(error())
            };
            let room = workspace(p.size);
            set(
                Pref::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const room).cast(),
                size_of::<usize>(),
            )?;
            for (which, value) in [
                (
                    Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
                    alignments[1],
                ),
                (
                    Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                    alignments[0],
                ),
                (
                    Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                    alignments[2],
                ),
                (
                    Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
                    alignments[2],
                ),
            ] {
                set(which, (&raw const value).cast(), 4)?;
            }
            let found = result::get_matmul_algo_heuristic(
                self.handle,
                desc.0,
                layouts[0].0,
                layouts[1].0,
                layouts[2].0,
                layouts[2].0,
                preference.0,
            );
            found.map_err(error())?.algo
        };
        Ok(Planned {
            desc,
            layouts,
            algo,
        })
    }
}

impl Kernels {
    /// Queues a product.
    ///
    /// # Safety
    /// The addresses hold the matrices that `product` says, d overlaps neither, and `room` is as long
    /// as [`workspace`] says; nobody unordered with the stream uses them.
    pub(super) unsafe fn product(
        &self,
        stream: cudarc::driver::sys::CUstream,
        product: Product,
        alpha: f32,
        [a, b, d]: [u64; 3],
        room: u64,
    ) -> Result<(), CudaError> {
        let alignments = [alignment(a), alignment(b), alignment(d)];
        let key = (product, alignments);
        if !self.blas.plans.borrow().contains_key(&key) {
            let plan = self.blas.plan(&product, alignments)?;
            self.blas.plans.borrow_mut().insert(key, plan);
        }
        let plans = self.blas.plans.borrow();
        let plan = &plans[&key];
        let beta = if product.add { 1.0f32 } else { 0.0f32 };
        // SAFETY: by the contract above.
        let done = unsafe {
            result::matmul(
                self.blas.handle,
                plan.desc.0,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                b as *const c_void,
                plan.layouts[0].0,
                a as *const c_void,
                plan.layouts[1].0,
                d as *const c_void,
                plan.layouts[2].0,
                d as *mut c_void,
                plan.layouts[2].0,
                &raw const plan.algo,
                room as *mut c_void,
                workspace(product.size),
                stream.cast(),
            )
        };
        done.map_err(failed(format!("{product:?}")))
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        self.plans.borrow_mut().clear();
        // SAFETY: made by `new`.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}
