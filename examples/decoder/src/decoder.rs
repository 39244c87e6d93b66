//! The whole model: its sections, the stages of a step, and what runs in each.

use forebay::ops::{self, ClassifierGrads, IGNORED};
use forebay::{
    DType, Error, Footprint, Init, Model, Pass, Result, Section, SectionId, StageId, StageLease,
    Step, Target, TensorMut, footprint,
};

use crate::config::Config;
use crate::layer::{self, Layer};
use crate::stages::{Back, Inputs, Stages};

/// Token ids and what should follow each, `[batch, seq]`, row-major.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// Token ids.
    pub ids: &'a [u32],
    /// Targets; [`IGNORED`] for those that do not count.
    pub targets: &'a [u32],
}

/// Which positions of a sequence logits are wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Positions {
    /// The last of each sequence.
    Last,
    /// All.
    All,
}

/// Called when a section's gradient is whole, before it leaves the device.
pub type Observer<'o> = dyn FnMut(&StageLease<'_>, SectionId) -> Result<()> + 'o;

/// A decoder for batches of one shape.
#[derive(Clone, Debug)]
pub struct Decoder {
    config: Config,
    batch: usize,
    seq: usize,
    /// Tokens that a layer computes on at once, whole sequences.
    piece: usize,
    model: Model,
    embed: SectionId,
    layers: Vec<SectionId>,
    norm: SectionId,
    head: SectionId,
    train: Stages,
    eval: Stages,
}

const WEIGHT: &str = "weight";

impl Decoder {
    /// Lays out a model for batches of `batch` sequences of `seq` tokens, computing in f32.
    ///
    /// # Errors
    /// [`Error::Model`] for an empty batch.
    pub fn new(config: Config, batch: usize, seq: usize) -> Result<Self> {
        Self::compute_in(DType::F32, config, batch, seq)
    }

    /// As [`Decoder::new`], with parameters and activations of this type.
    ///
    /// # Errors
    /// As [`Decoder::new`].
    pub fn compute_in(dtype: DType, config: Config, batch: usize, seq: usize) -> Result<Self> {
        Self::build(dtype, config, [batch, seq], 1)
    }

    /// Keeps the input of every n-th layer only as a checkpoint, as ZeRO-Infinity does (section 3, its `ci`): an
    /// n-th of their memory and traffic, for n states in scratch memory, and for computing layers forward once
    /// more. In the backward pass the inputs of a group's layers are computed from its checkpoint, and kept while
    /// that group is at work. Those of the last group are kept from the forward pass. Results have the same
    /// bits for every n; with 1, as without this, a layer computes its own forward pass only.
    ///
    /// # Errors
    /// [`Error::Model`] for 0.
    pub fn with_checkpoints_every(self, layers: usize) -> Result<Self> {
        if layers == 0 {
            let what = "checkpoints every 0 layers: give 1 or more".to_owned();
            return Err(Error::Model(what));
        }
        let shape = [self.batch, self.seq];
        let built = Self::build(self.model.dtype(), self.config, shape, layers)?;
        Ok(Self {
            piece: self.piece,
            ..built
        })
    }

    fn build(dtype: DType, config: Config, [batch, seq]: [usize; 2], every: usize) -> Result<Self> {
        if batch * seq == 0 {
            return Err(Error::Model(
                "a batch needs at least one sequence of one token".into(),
            ));
        }
        let Config {
            hidden,
            vocabulary,
            layers,
            ..
        } = config;
        let mut model = Model::new(format!("decoder {config:?}")).compute_in(dtype);
        let table = |name: &str| {
            Section::new(name).tensor(WEIGHT, [vocabulary, hidden], Init::Normal(config.init))
        };
        let embed = model.section(table("embed_tokens"));
        let layers: Vec<_> = (0..layers)
            .map(|i| model.section(layer::section(&config, i)))
            .collect();
        let norm = Section::new("norm").tensor(WEIGHT, [hidden], Init::Constant(1.0));
        let norm = model.section(norm);
        let head = if config.tied {
            embed
        } else {
            model.section(table("lm_head"))
        };
        let state = [batch * seq, hidden];
        let train = Stages::train(&mut model, embed, &layers, [norm, head], (state, every));
        let eval = Stages::eval(&mut model, embed, &layers, [norm, head]);
        Ok(Self {
            config,
            batch,
            seq,
            piece: batch * seq,
            model,
            embed,
            layers,
            norm,
            head,
            train,
            eval,
        })
    }

    /// Computes each layer on the batch in so many pieces, whose gradients add up: in memory for activations of
    /// one piece, plus the states between layers. A layer takes all pieces before the next one does, so
    /// that its parameters come and its gradient leaves once. The bits of sums depend on the number.
    ///
    /// # Errors
    /// [`Error::Model`] if the pieces would not be equally many whole sequences.
    pub fn in_micro_batches(mut self, pieces: usize) -> Result<Self> {
        if pieces == 0 || !self.batch.is_multiple_of(pieces) {
            let what = format!(
                "{} sequences are not {pieces} equal micro-batches",
                self.batch
            );
            return Err(Error::Model(what));
        }
        self.piece = self.batch / pieces * self.seq;
        Ok(self)
    }

    /// Layers for each checkpoint ([`Decoder::with_checkpoints_every`]).
    pub fn checkpoints_every(&self) -> usize {
        self.train.every
    }

    /// The model as the runtime takes it.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Its shape.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// What a step of this decoder needs besides its sections, on what [`forebay::Options::target`] says.
    ///
    /// # Errors
    /// None that a decoder that could be made would give.
    pub fn footprint(&self, target: Target) -> Result<Footprint> {
        let zeros = vec![0; self.batch * self.seq];
        let batch = Batch {
            ids: &zeros,
            targets: &zeros,
        };
        let train = footprint(&self.model, Pass::Train, target, |step| {
            self.train_step(step, &batch)
        })?;
        let loss = footprint(&self.model, Pass::Eval, target, |step| {
            self.eval_loss(step, &batch).map(|_| ())
        })?;
        let logits = footprint(&self.model, Pass::Eval, target, |step| {
            self.logits(step, &zeros, self.seq, Positions::Last)
                .map(|_| ())
        })?;
        Ok(train.max(loss).max(logits))
    }

    /// The name under which Hugging Face keeps a tensor.
    pub fn hf_name(&self, section: SectionId, tensor: &str) -> String {
        let name = self.model.sections()[section.0 as usize].name();
        if name == "lm_head" {
            format!("{name}.{tensor}")
        } else {
            format!("model.{name}.{tensor}")
        }
    }

    /// Queues a whole training step and reports its loss, the mean over targets that count.
    ///
    /// # Errors
    /// A batch of another shape; whatever the runtime meets.
    pub fn train_step(&self, step: &Step<'_>, batch: &Batch<'_>) -> Result<()> {
        self.train_step_observed(step, batch, &mut |_, _| Ok(()))
    }

    /// As [`Decoder::train_step`], calling `observer` for each section whose gradient (times
    /// [`Step::loss_scale`]) is whole.
    ///
    /// # Errors
    /// As [`Decoder::train_step`], and the observer's own.
    pub fn train_step_observed(
        &self,
        step: &Step<'_>,
        batch: &Batch<'_>,
        observer: &mut Observer<'_>,
    ) -> Result<()> {
        let tokens = self.batch * self.seq;
        let ids = step.upload(batch.ids, [tokens])?;
        let targets = step.upload(batch.targets, [tokens])?;
        let mut inputs = self.train.inputs(step, [tokens, self.config.hidden])?;
        let frame = step.frame();
        let mut x = frame.tensor([tokens, self.config.hidden])?;
        self.embed(step, self.train.embed, &ids, &mut x)?;
        for (index, (stage, section)) in self.train.layers.iter().zip(&self.layers).enumerate() {
            let lease = step.enter(*stage)?;
            if self.train.saves(index) {
                lease.save(&x.as_ref())?;
            } else if let Some((inputs, place)) = self.train.kept(&mut inputs, index) {
                ops::copy(step, &x.as_ref(), &mut inputs.at(place)?)?;
            }
            for (start, layer) in self.pieces(tokens, self.seq) {
                let mut x = x.rows(start, layer.tokens())?;
                layer.forward(step, &lease, *section, &mut x)?;
            }
        }
        // From here on `x` is the gradient of the state it was.
        {
            let lease = step.enter(self.train.head)?;
            let loss = self.head(step, &lease, &targets, batch.targets, &mut x, true)?;
            step.loss(&loss.as_ref())?;
            observer(&lease, self.norm)?;
            if self.head != self.embed {
                observer(&lease, self.head)?;
            }
        }
        for back in &self.train.backward {
            match *back {
                Back::Again(stage, index) => {
                    if let Some(inputs) = &mut inputs {
                        self.again(step, stage, index, inputs)?;
                    }
                }
                Back::Gradient(stage, index) => {
                    let lease = step.enter(stage)?;
                    self.layer_backward(step, &lease, index, inputs.as_ref(), &mut x)?;
                    observer(&lease, self.layers[index])?;
                }
            }
        }
        if let Some(stage) = self.train.embed_backward {
            let lease = step.enter(stage)?;
            let mut grad = lease.grad(self.embed, WEIGHT)?;
            ops::embedding_backward(step, &ids, &x.as_ref(), &mut grad)?;
            observer(&lease, self.embed)?;
        }
        Ok(())
    }

    /// A layer forward once more, from its input to that of the layer after it.
    fn again(
        &self,
        step: &Step<'_>,
        stage: StageId,
        index: usize,
        inputs: &mut Inputs<'_>,
    ) -> Result<()> {
        let lease = step.enter(stage)?;
        let place = self.train.place(index);
        if self.train.saves(index) {
            ops::copy(step, &lease.saved()?, &mut inputs.at(place)?)?;
        }
        let mut x = inputs.next(step, place)?;
        for (start, layer) in self.pieces(self.batch * self.seq, self.seq) {
            let mut x = x.rows(start, layer.tokens())?;
            layer.forward(step, &lease, self.layers[index], &mut x)?;
        }
        Ok(())
    }

    /// From the gradient of a layer's output in `x` to that of its input, and of its weights.
    fn layer_backward(
        &self,
        step: &Step<'_>,
        lease: &StageLease<'_>,
        index: usize,
        inputs: Option<&Inputs<'_>>,
        x: &mut TensorMut<'_>,
    ) -> Result<()> {
        let saved = match inputs {
            Some(inputs) => inputs.get(self.train.place(index))?,
            None => lease.saved()?,
        };
        for (start, layer) in self.pieces(self.batch * self.seq, self.seq) {
            let rows = layer.tokens();
            let (saved, mut dx) = (saved.rows(start, rows)?, x.rows(start, rows)?);
            layer.backward(step, lease, self.layers[index], &saved, &mut dx)?;
        }
        Ok(())
    }

    /// The loss of a batch, without gradients; waits for it.
    ///
    /// # Errors
    /// As [`Decoder::train_step`].
    pub fn eval_loss(&self, step: &Step<'_>, batch: &Batch<'_>) -> Result<f32> {
        let tokens = self.batch * self.seq;
        let ids = step.upload(batch.ids, [tokens])?;
        let targets = step.upload(batch.targets, [tokens])?;
        let frame = step.frame();
        let mut x = frame.tensor([tokens, self.config.hidden])?;
        self.forward(step, self.seq, &ids, &mut x)?;
        let lease = step.enter(self.eval.head)?;
        let loss = self.head(step, &lease, &targets, batch.targets, &mut x, false)?;
        let mut value = [0.0];
        step.read(&loss.as_ref(), &mut value)?;
        Ok(value[0])
    }

    /// Logits of sequences of `seq` tokens, at most as many tokens in all as the decoder was made
    /// for: `[sequences or tokens, vocabulary]`, row-major.
    ///
    /// # Errors
    /// As [`Decoder::train_step`].
    pub fn logits(
        &self,
        step: &Step<'_>,
        ids: &[u32],
        seq: usize,
        positions: Positions,
    ) -> Result<Vec<f32>> {
        let batch = ids.len() / seq.max(1);
        if batch * seq != ids.len() || ids.is_empty() || ids.len() > self.batch * self.seq {
            let what = format!(
                "{} ids are not whole sequences of {seq} that fit",
                ids.len()
            );
            return Err(Error::Shape {
                operation: "logits",
                what,
            });
        }
        let ids = step.upload(ids, [batch * seq])?;
        let frame = step.frame();
        let Config {
            hidden,
            vocabulary,
            eps,
            ..
        } = self.config;
        let mut x = frame.tensor([batch * seq, hidden])?;
        self.forward(step, seq, &ids, &mut x)?;
        let lease = step.enter(self.eval.head)?;
        let mut normed = frame.tensor([batch * seq, hidden])?;
        ops::rms_norm(
            step,
            &x.as_ref(),
            &lease.param(self.norm, WEIGHT)?,
            eps,
            &mut normed,
        )?;
        let (first, stride) = match positions {
            Positions::Last => (seq - 1, seq),
            Positions::All => (0, 1),
        };
        let mut all = Vec::new();
        let mut row = frame.tensor([1, vocabulary])?;
        let weight = lease.param(self.head, WEIGHT)?;
        for token in (first..batch * seq).step_by(stride) {
            ops::linear(step, &normed.as_ref().rows(token, 1)?, &weight, &mut row)?;
            let start = all.len();
            all.resize(start + vocabulary, 0.0);
            step.read(&row.as_ref(), &mut all[start..])?;
        }
        Ok(all)
    }

    /// What computes a layer on so many tokens of whole sequences, piece by piece, and where each begins.
    fn pieces(&self, tokens: usize, seq: usize) -> impl Iterator<Item = (usize, Layer<'_>)> {
        let piece = (self.piece / seq).max(1) * seq;
        (0..tokens).step_by(piece).map(move |start| {
            let layer = Layer {
                config: &self.config,
                batch: piece.min(tokens - start) / seq,
                seq,
            };
            (start, layer)
        })
    }

    fn embed(
        &self,
        step: &Step<'_>,
        stage: StageId,
        ids: &forebay::Tensor<'_>,
        x: &mut TensorMut<'_>,
    ) -> Result<()> {
        let lease = step.enter(stage)?;
        ops::embedding(step, ids, &lease.param(self.embed, WEIGHT)?, x)
    }

    /// Embedding and layers of an evaluation.
    fn forward(
        &self,
        step: &Step<'_>,
        seq: usize,
        ids: &forebay::Tensor<'_>,
        x: &mut TensorMut<'_>,
    ) -> Result<()> {
        self.embed(step, self.eval.embed, ids, x)?;
        let tokens = ids.shape().elements();
        for (stage, section) in self.eval.layers.iter().zip(&self.layers) {
            let lease = step.enter(*stage)?;
            for (start, layer) in self.pieces(tokens, seq) {
                let mut x = x.rows(start, layer.tokens())?;
                layer.forward(step, &lease, *section, &mut x)?;
            }
        }
        Ok(())
    }

    /// Norm, classifier and loss; with `backward` their gradients too, `x` becoming its own.
    fn head<'s>(
        &self,
        step: &'s Step<'_>,
        lease: &StageLease<'_>,
        targets: &forebay::Tensor<'_>,
        values: &[u32],
        x: &mut TensorMut<'_>,
        backward: bool,
    ) -> Result<TensorMut<'s>> {
        let eps = self.config.eps;
        let counted = values.iter().filter(|t| **t != IGNORED).count().max(1);
        let scale = 1.0 / counted as f32;
        let mut loss = step.tensor(DType::F32, [1])?;
        let frame = step.frame();
        let mut normed = frame.tensor(x.shape())?;
        let (norm, weight) = (
            lease.param(self.norm, WEIGHT)?,
            lease.param(self.head, WEIGHT)?,
        );
        ops::rms_norm(step, &x.as_ref(), &norm, eps, &mut normed)?;
        let normed = normed.as_ref();
        if !backward {
            ops::cross_entropy(step, &normed, &weight, targets, scale, &mut loss, None)?;
            return Ok(loss);
        }
        let mut dnormed = frame.tensor(x.shape())?;
        let dweight = lease.grad(self.head, WEIGHT)?;
        let grads = ClassifierGrads {
            dx: dnormed.reborrow(),
            dweight,
            loss_scale: step.loss_scale()?,
        };
        ops::cross_entropy(
            step,
            &normed,
            &weight,
            targets,
            scale,
            &mut loss,
            Some(grads),
        )?;
        let mut dx = frame.tensor(x.shape())?;
        let (dnormed, grad) = (dnormed.as_ref(), &mut lease.grad(self.norm, WEIGHT)?);
        let set = ops::Assign::Set;
        ops::rms_norm_backward(step, &x.as_ref(), &norm, eps, &dnormed, &mut dx, set, grad)?;
        ops::copy(step, &dx.as_ref(), x)?;
        Ok(loss)
    }
}
