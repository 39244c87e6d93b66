//! How a call comes in: counted, failed where that was asked for, refused on a lost device; and the
//! types of C's arguments.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::{CStr, c_char};

use crate::machine::{State, machine};

/// What a call answers but success: a code of its library.
pub(crate) type Done = Result<(), i32>;

/// Codes of `CUresult`.
pub(crate) mod code {
    pub(crate) const INVALID_VALUE: i32 = 1;
    pub(crate) const OUT_OF_MEMORY: i32 = 2;
    pub(crate) const INVALID_CONTEXT: i32 = 201;
    pub(crate) const INVALID_HANDLE: i32 = 400;
    pub(crate) const NOT_FOUND: i32 = 500;
    pub(crate) const NOT_READY: i32 = 600;
    pub(crate) const ILLEGAL_ADDRESS: i32 = 700;
    pub(crate) const ALREADY_REGISTERED: i32 = 712;
    pub(crate) const NOT_REGISTERED: i32 = 713;
    pub(crate) const ILLEGAL_INSTRUCTION: i32 = 715;
}

thread_local! {
    static HERE: RefCell<HashMap<&'static str, u64>> = RefCell::default();
    static CURRENT: Cell<bool> = const { Cell::new(false) };
}

/// Calls of the calling thread since the process began.
pub(crate) fn count_here(function: &str) -> u64 {
    HERE.with_borrow(|counts| counts.get(function).copied().unwrap_or(0))
}

/// Makes a context current on the calling thread, or none.
pub(crate) fn make_current(context: bool) {
    CURRENT.set(context);
}

/// What a function needs before it does anything.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Needs {
    /// Nothing: it answers on a lost device too.
    Nothing,
    /// A device that is not lost.
    Device,
    /// A context that is current on this thread as well.
    Context,
}

/// Runs the body of an exported function.
pub(crate) fn call(
    function: &'static str,
    needs: Needs,
    body: impl FnOnce(&mut State) -> Done,
) -> i32 {
    count(function);
    let mut state = machine().lock();
    match state.enter(function, needs, CURRENT.get()) {
        Ok(()) => body(&mut state).err().unwrap_or(0),
        Err(code) => code,
    }
}

/// Counts something on the calling thread only.
pub(crate) fn count(what: &'static str) {
    HERE.with_borrow_mut(|counts| *counts.entry(what).or_default() += 1);
}

/// A place for an answer, as C passes it.
#[repr(transparent)]
pub(crate) struct Place<T>(*mut T);

impl<T> Place<T> {
    pub(crate) fn set(&self, value: T) -> Done {
        if self.0.is_null() {
            return Err(code::INVALID_VALUE);
        }
        // SAFETY: the contract of every function that takes such a place: it is valid for a `T`.
        unsafe { self.0.write(value) };
        Ok(())
    }

    /// What was there, with `value` in its place.
    pub(crate) fn replace(&self, value: T) -> Result<T, i32> {
        if self.0.is_null() {
            return Err(code::INVALID_VALUE);
        }
        // SAFETY: as in `set`; the place holds a `T` already, as such functions demand.
        Ok(unsafe { self.0.replace(value) })
    }
}

/// A string, as C passes it.
#[repr(transparent)]
pub(crate) struct Text(*const c_char);

impl Text {
    pub(crate) fn get(&self) -> &str {
        if self.0.is_null() {
            return "";
        }
        // SAFETY: the contract of every function that takes a string: it ends with a zero.
        unsafe { CStr::from_ptr(self.0) }
            .to_str()
            .unwrap_or_default()
    }
}
