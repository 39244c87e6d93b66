//! What a trainer tells the runtime about its model: sections of tensors, and the stages of a
//! step that use them.

use forebay_prefetch as order;
pub use forebay_prefetch::SectionId;

use crate::error::{Error, Result};
use crate::tensor::{DType, Shape};

/// How a tensor starts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// All elements equal.
    Constant(f32),
    /// Normal with mean 0 and this standard deviation, from the run's seed and the tensor's name.
    Normal(f32),
}

/// A tensor of a section.
#[derive(Clone, Debug)]
pub struct TensorSpec {
    /// Its name, unique in the section.
    pub name: String,
    /// Its shape.
    pub shape: Shape,
    /// How it starts.
    pub init: Init,
    /// Whether weight decay applies: by custom to matrices and not to norms.
    pub decay: bool,
}

/// The tensors that move together: a layer, an embedding.
#[derive(Clone, Debug)]
pub struct Section {
    pub(crate) name: String,
    pub(crate) tensors: Vec<TensorSpec>,
}

/// Elements between the starts of two tensors of a section are a multiple of this, so that each is
/// aligned to 256 bytes in f32 (and 128 in bf16 and f16).
const TENSOR_ALIGN: usize = 64;

impl Section {
    /// A section without tensors yet; the name appears in errors, stores and traces.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            tensors: Vec::new(),
        }
    }

    /// Adds a tensor. Matrices take weight decay, vectors do not.
    #[must_use]
    pub fn tensor(mut self, name: impl Into<String>, shape: impl Into<Shape>, init: Init) -> Self {
        let shape = shape.into();
        let decay = shape.dims().len() > 1;
        self.tensors.push(TensorSpec {
            name: name.into(),
            shape,
            init,
            decay,
        });
        self
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its tensors, in layout order.
    pub fn tensors(&self) -> &[TensorSpec] {
        &self.tensors
    }

    /// Elements of its tensors, without padding.
    pub fn parameters(&self) -> u64 {
        self.tensors.iter().map(|t| t.shape.elements() as u64).sum()
    }

    /// Elements that the section occupies: every tensor starts aligned.
    pub(crate) fn elements(&self) -> u64 {
        self.places().last().map_or(0, |(start, tensor)| {
            (start + tensor.shape.elements()).next_multiple_of(TENSOR_ALIGN) as u64
        })
    }

    /// Each tensor with the element at which it starts.
    pub(crate) fn places(&self) -> impl Iterator<Item = (usize, &TensorSpec)> {
        self.tensors.iter().scan(0, |next, tensor| {
            let start = *next;
            *next = (start + tensor.shape.elements()).next_multiple_of(TENSOR_ALIGN);
            Some((start, tensor))
        })
    }
}

/// A stage of a step, in compute order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StageId(pub(crate) u32);

impl From<u32> for StageId {
    /// The stage added at this place, counted from 0, of the pass at hand.
    fn from(index: u32) -> Self {
        Self(index)
    }
}

/// What one stage of a step needs and leaves.
#[derive(Clone, Debug, Default)]
pub struct Stage {
    pub(crate) name: String,
    pub(crate) params: Vec<SectionId>,
    pub(crate) gathers: Vec<SectionId>,
    pub(crate) grads: Vec<SectionId>,
    pub(crate) saves: Option<Shape>,
    pub(crate) restores: Option<StageId>,
}

impl Stage {
    /// A stage that uses nothing yet.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            ..Self::default()
        }
    }

    /// The parameters of these sections must be on the device.
    #[must_use]
    pub fn params(mut self, sections: impl IntoIterator<Item = SectionId>) -> Self {
        self.params.extend(sections);
        self
    }

    /// It reads single rows of these sections' tensors (those of an embedding that a batch names) and
    /// needs no whole one on the device. Where such a section is there, it is used there; where its
    /// parameters live in pinned memory, operations read the rows from it over the link, as PyTorch-Direct
    /// (arXiv 2101.07956) does, and neither a copy nor a slot is needed; from disk it comes as a whole.
    ///
    /// A section that no stage names in [`Stage::params`] is placed for that: it takes device memory only
    /// where its optimizer states have room there too, or what it would take of pinned memory is short. A
    /// lease gives its tensors as any others, for operations to read; they are not copied, saved or read
    /// back. What a stage names here it does not name in [`Stage::params`].
    #[must_use]
    pub fn gathers(mut self, sections: impl IntoIterator<Item = SectionId>) -> Self {
        self.gathers.extend(sections);
        self
    }

    /// It adds to the gradients of these sections. The gradient of a section is zeroed before the
    /// first stage of the step that names it here, and leaves the device after the last one.
    #[must_use]
    pub fn grads(mut self, sections: impl IntoIterator<Item = SectionId>) -> Self {
        self.grads.extend(sections);
        self
    }

    /// It leaves an activation checkpoint of this shape, in the model's type, for a later stage.
    #[must_use]
    pub fn saves(mut self, shape: impl Into<Shape>) -> Self {
        self.saves = Some(shape.into());
        self
    }

    /// It needs the checkpoint that `stage` left.
    #[must_use]
    pub fn restores(mut self, stage: StageId) -> Self {
        self.restores = Some(stage);
        self
    }
}

/// A model as the runtime sees it.
#[derive(Clone, Debug)]
pub struct Model {
    pub(crate) name: String,
    pub(crate) dtype: DType,
    pub(crate) sections: Vec<Section>,
    pub(crate) train: Vec<Stage>,
    pub(crate) eval: Vec<Stage>,
}

impl Model {
    /// A model without sections yet. The name is stored with its states: a store opens only under
    /// a model of the same name, sections, shapes and type.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            dtype: DType::F32,
            sections: Vec::new(),
            train: Vec::new(),
            eval: Vec::new(),
        }
    }

    /// The type of parameters, of gradients on their way, of activations and checkpoints: f32 unless
    /// said otherwise. Masters, moments, sums and the gradients' accumulation are f32 in any case.
    #[must_use]
    pub fn compute_in(mut self, dtype: DType) -> Self {
        self.dtype = dtype;
        self
    }

    /// What [`Model::compute_in`] said.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Adds a section.
    pub fn section(&mut self, section: Section) -> SectionId {
        self.sections.push(section);
        SectionId(self.sections.len() as u32 - 1)
    }

    /// Adds the next stage of a training step: forward, loss, backward.
    pub fn train_stage(&mut self, stage: Stage) -> StageId {
        self.train.push(stage);
        StageId(self.train.len() as u32 - 1)
    }

    /// Adds the next stage of a forward pass without gradients (held-out loss, sampling).
    pub fn eval_stage(&mut self, stage: Stage) -> StageId {
        self.eval.push(stage);
        StageId(self.eval.len() as u32 - 1)
    }

    /// Its sections, in the order in which they were added.
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// Parameters in all.
    pub fn parameters(&self) -> u64 {
        self.sections.iter().map(Section::parameters).sum()
    }

    /// Elements that its sections occupy: parameters, and what aligns every tensor. What moves and is
    /// stored is counted in these.
    pub fn elements(&self) -> u64 {
        self.sections.iter().map(Section::elements).sum()
    }

    /// The model's identity: its name and type, and every section and tensor by name and shape.
    pub(crate) fn fingerprint(&self) -> u64 {
        let mut words: Vec<Vec<u8>> = vec![self.name.clone().into_bytes()];
        if self.dtype != DType::F32 {
            words.push(self.dtype.to_string().into_bytes());
        }
        for section in &self.sections {
            words.push(section.name.clone().into_bytes());
            for tensor in &section.tensors {
                words.push(tensor.name.clone().into_bytes());
                words.extend(
                    tensor
                        .shape
                        .dims()
                        .iter()
                        .map(|d| (*d as u64).to_le_bytes().to_vec()),
                );
            }
        }
        fnv(words.iter().map(Vec::as_slice))
    }

    pub(crate) fn validate(&self) -> Result<()> {
        if self.dtype == DType::U32 {
            let what = "models compute in f32, bf16 or f16, not in u32".to_owned();
            return Err(Error::Model(what));
        }
        for (i, section) in self.sections.iter().enumerate() {
            if section.parameters() == 0 {
                return Err(Error::Model(format!(
                    "section '{}' holds no elements",
                    section.name
                )));
            }
            if self.sections[..i].iter().any(|s| s.name == section.name) {
                return Err(Error::Model(format!(
                    "two sections are named '{}'",
                    section.name
                )));
            }
            for (t, tensor) in section.tensors.iter().enumerate() {
                if section.tensors[..t]
                    .iter()
                    .any(|other| other.name == tensor.name)
                {
                    let (section, tensor) = (&section.name, &tensor.name);
                    return Err(Error::Model(format!(
                        "'{section}' has two tensors '{tensor}'"
                    )));
                }
            }
        }
        Ok(())
    }

    /// Where in a section's slot the gradient that leaves stands, if it is not the sums themselves.
    pub(crate) fn cast_offset(&self, section: &Section) -> Option<u64> {
        (self.dtype != DType::F32).then(|| section.elements() * 4)
    }

    /// The model as plans see it.
    pub(crate) fn order(&self) -> order::Model {
        let bytes = self.dtype.bytes() as u64;
        let section = |s: &Section| order::SectionSize {
            name: s.name.clone(),
            elements: s.elements(),
            param_bytes: s.elements() * bytes,
            grad_slot_bytes: s.elements() * 4
                + self.cast_offset(s).map_or(0, |_| s.elements() * bytes),
        };
        let stage = |s: &Stage| order::StageSpec {
            name: s.name.clone(),
            params: s.params.clone(),
            gathers: s.gathers.clone(),
            grads: s.grads.clone(),
            saves: s.saves.map(|shape| shape.elements() as u64 * bytes),
            restores: s.restores.map(|id| order::StageId(id.0)),
        };
        order::Model {
            sections: self.sections.iter().map(section).collect(),
            stages: self.train.iter().map(stage).collect(),
            eval: self.eval.iter().map(stage).collect(),
        }
    }
}

/// FNV-1a, 64 bits, of a list of words: where identity across versions matters more than speed.
pub(crate) fn fnv<'a>(words: impl IntoIterator<Item = &'a [u8]>) -> u64 {
    words
        .into_iter()
        .flat_map(|word| word.iter().chain(&[0xff]))
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        })
}
