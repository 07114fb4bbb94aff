//! One exception class for each error variant of what this module exposes, under one base.

use pdlink::kv::{KvError, ParamsError};
use pdlink::security::SecretError;
use pyo3::create_exception;
use pyo3::exceptions::PyException;
use pyo3::prelude::*;

macro_rules! exceptions {
    ($($name:ident($base:ty)),+ $(,)?) => {
        $(create_exception!(pdlink, $name, $base);)+

        /// Adds every class to the module.
        pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
            $(module.add(stringify!($name), module.py().get_type::<$name>())?;)+
            Ok(())
        }
    };
}

exceptions! {
    PdlinkError(PyException),
    SettingsError(PdlinkError),
    AddressError(PdlinkError),
    SecretFileError(PdlinkError),
    TransferParamsError(PdlinkError),
    MalformedParamsError(TransferParamsError),
    BothSidesError(TransferParamsError),
    ForeignParamsError(TransferParamsError),
    ParamsVersionError(TransferParamsError),
    ParamsTooLargeError(TransferParamsError),
    BrokenSealError(TransferParamsError),
    CardsError(TransferParamsError),
    SendError(PdlinkError),
    LinkError(PdlinkError),
    LayoutError(LinkError),
    ControlError(LinkError),
    DuplicateTransferError(LinkError),
    EndpointsError(LinkError),
    WrongRoleError(LinkError),
    NotAsyncError(LinkError),
    BlockCountError(LinkError),
    StartError(LinkError),
    NoPathError(LinkError),
    ShutDownError(LinkError),
}

/// Settings that are not what the package's own code writes.
pub(crate) fn settings(what: &str, error: &dyn std::fmt::Display) -> PyErr {
    SettingsError::new_err(format!("{what}: {error}"))
}

pub(crate) fn secret(error: &SecretError) -> PyErr {
    SecretFileError::new_err(error.to_string())
}

pub(crate) fn params(error: &ParamsError) -> PyErr {
    let text = error.to_string();
    match error {
        ParamsError::Malformed(_) => MalformedParamsError::new_err(text),
        ParamsError::BothSides => BothSidesError::new_err(text),
        ParamsError::Foreign => ForeignParamsError::new_err(text),
        ParamsError::Version { .. } => ParamsVersionError::new_err(text),
        ParamsError::TooLarge { .. } => ParamsTooLargeError::new_err(text),
        ParamsError::BrokenEarlySeal { .. } | ParamsError::BrokenSeal { .. } => BrokenSealError::new_err(text),
        ParamsError::Cards(_) => CardsError::new_err(text),
    }
}

pub(crate) fn kv(error: &KvError) -> PyErr {
    let text = error.to_string();
    match error {
        KvError::Params(error) => params(error),
        KvError::Layout(_) => LayoutError::new_err(text),
        KvError::Control(_) => ControlError::new_err(text),
        KvError::Duplicate { .. } => DuplicateTransferError::new_err(text),
        KvError::Endpoints { .. } => EndpointsError::new_err(text),
        KvError::WrongRole { .. } => WrongRoleError::new_err(text),
        KvError::NotAsync { .. } => NotAsyncError::new_err(text),
        KvError::Extent { .. } => BlockCountError::new_err(text),
        KvError::Start(_) => StartError::new_err(text),
        KvError::NoPath { .. } => NoPathError::new_err(text),
        KvError::ShutDown => ShutDownError::new_err(text),
    }
}
