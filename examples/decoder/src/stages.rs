//! The stages of a pass, and which layers' inputs are kept between forward and backward.

use forebay::{Model, Result, SectionId, Stage, StageId, Step, Tensor, TensorMut, ops};

/// The stages of a pass.
#[derive(Clone, Debug)]
pub(crate) struct Stages {
    pub(crate) embed: StageId,
    pub(crate) layers: Vec<StageId>,
    pub(crate) head: StageId,
    /// In compute order: the last layer first; empty in evaluation.
    pub(crate) backward: Vec<Back>,
    pub(crate) embed_backward: Option<StageId>,
    /// Layers for each checkpoint: a group.
    pub(crate) every: usize,
}

/// A stage of the backward pass, and its layer.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Back {
    /// The layer forward once more, for the input of the next one.
    Again(StageId, usize),
    /// Its gradients.
    Gradient(StageId, usize),
}

/// The inputs of a group's layers, one behind the other; each group writes over those of the one before.
pub(crate) struct Inputs<'s> {
    all: TensorMut<'s>,
    /// Rows of one, and rows from one to the next.
    rows: usize,
    stride: usize,
}

impl Inputs<'_> {
    /// The one at a place in its group, to be written.
    pub(crate) fn at(&mut self, place: usize) -> Result<TensorMut<'_>> {
        self.all.rows(place * self.stride, self.rows)
    }

    /// The one at a place in its group.
    pub(crate) fn get(&self, place: usize) -> Result<Tensor<'_>> {
        self.all.as_ref().rows(place * self.stride, self.rows)
    }

    /// The one after a place, with what that one holds.
    pub(crate) fn next(&mut self, step: &Step<'_>, place: usize) -> Result<TensorMut<'_>> {
        let (before, mut after) = self.all.split((place + 1) * self.stride)?;
        let input = before.as_ref().rows(place * self.stride, self.rows)?;
        ops::copy(step, &input, &mut after.rows(0, self.rows)?)?;
        self.at(place + 1)
    }
}

impl Stages {
    /// Those of a training step in which every `every`-th layer leaves its input, of shape `state`.
    pub(crate) fn train(
        model: &mut Model,
        embed: SectionId,
        layers: &[SectionId],
        head: [SectionId; 2],
        (state, every): ([usize; 2], usize),
    ) -> Self {
        // Where the classifier is the same table, that stage has it whole on the device, and so has this one.
        let first = model.train_stage(Stage::new("embed").gathers([embed]));
        let mut stages = Self {
            embed: first,
            layers: Vec::new(),
            head: first,
            backward: Vec::new(),
            embed_backward: None,
            every: every.clamp(1, layers.len().max(1)),
        };
        for (index, section) in layers.iter().enumerate() {
            let mut stage = Stage::new(format!("layer {index} forward")).params([*section]);
            if stages.saves_of(index, layers.len()) {
                stage = stage.saves(state);
            }
            stages.layers.push(model.train_stage(stage));
        }
        stages.head = model.train_stage(Stage::new("head").params(head).grads(head));
        for start in (0..layers.len()).step_by(stages.every).rev() {
            stages.group(model, layers, start);
        }
        stages.embed_backward =
            Some(model.train_stage(Stage::new("embed backward").grads([embed])));
        stages
    }

    /// The backward pass of the layers from `start` on that share a checkpoint.
    fn group(&mut self, model: &mut Model, layers: &[SectionId], start: usize) {
        let end = (start + self.every).min(layers.len());
        let restores = |stage: Stage, index: usize| match index == start && self.saves(index) {
            true => stage.restores(self.layers[index]),
            false => stage,
        };
        let mut back = Vec::new();
        // The last group's are there still.
        if self.every > 1 && end < layers.len() {
            for (index, section) in layers.iter().enumerate().take(end - 1).skip(start) {
                let stage = Stage::new(format!("layer {index} again")).params([*section]);
                let stage = model.train_stage(restores(stage, index));
                back.push(Back::Again(stage, index));
            }
        }
        for index in (start..end).rev() {
            let (section, stage) = (layers[index], Stage::new(format!("layer {index} backward")));
            let mut stage = stage.params([section]).grads([section]);
            if self.every == 1 {
                stage = restores(stage, index);
            }
            let stage = model.train_stage(stage);
            back.push(Back::Gradient(stage, index));
        }
        self.backward.extend(back);
    }

    /// Those of an evaluation.
    pub(crate) fn eval(
        model: &mut Model,
        embed: SectionId,
        layers: &[SectionId],
        head: [SectionId; 2],
    ) -> Self {
        let embed = model.eval_stage(Stage::new("embed").gathers([embed]));
        let stage = |(i, s): (usize, &SectionId)| {
            model.eval_stage(Stage::new(format!("layer {i}")).params([*s]))
        };
        let layers = layers.iter().enumerate().map(stage).collect();
        let head = model.eval_stage(Stage::new("head").params(head));
        Self {
            embed,
            layers,
            head,
            backward: Vec::new(),
            embed_backward: None,
            every: 1,
        }
    }

    /// Whether a layer leaves its input as a checkpoint: the first of each group. The last group keeps its own in
    /// scratch memory until the backward pass, which begins with it.
    pub(crate) fn saves(&self, layer: usize) -> bool {
        self.saves_of(layer, self.layers.len())
    }

    fn saves_of(&self, layer: usize, layers: usize) -> bool {
        self.every == 1 || layer.is_multiple_of(self.every) && layer + self.every < layers
    }

    /// A layer's place in its group.
    pub(crate) fn place(&self, layer: usize) -> usize {
        layer % self.every
    }

    /// Where the forward pass keeps a layer's input until the backward pass.
    pub(crate) fn kept<'i, 's>(
        &self,
        inputs: &'i mut Option<Inputs<'s>>,
        layer: usize,
    ) -> Option<(&'i mut Inputs<'s>, usize)> {
        let last = self.layers.len().saturating_sub(1) / self.every * self.every;
        let inputs = inputs.as_mut().filter(|_| layer >= last)?;
        Some((inputs, self.place(layer)))
    }

    /// Memory of a step for the inputs of one group, if groups have more than a layer.
    pub(crate) fn inputs<'s>(
        &self,
        step: &'s Step<'_>,
        state: [usize; 2],
    ) -> Result<Option<Inputs<'s>>> {
        /// At which each input begins, as the state of the forward pass does: products are of the same alignment.
        const ALIGN: usize = 256;
        let places = self.every.min(self.layers.len());
        if places < 2 {
            return Ok(None);
        }
        let [rows, width] = state;
        let dtype = step.dtype();
        let aligned = (1..=ALIGN).find(|rows| (rows * width * dtype.bytes()).is_multiple_of(ALIGN));
        let stride = rows.next_multiple_of(aligned.unwrap_or(1));
        let all = step.tensor(dtype, [places * stride, width])?;
        Ok(Some(Inputs { all, rows, stride }))
    }
}
