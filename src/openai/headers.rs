//! Header names on the HTTP side, all lower case as the wire has them.

use http::HeaderName;

/// The client's own name for a request; kept for logs, sent on both legs, echoed.
pub const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Names one transfer: 32 hex digits. Put on the client's response by the proxy; `GET /admin/transfers/{id}` takes it.
pub const X_PDLINK_TRANSFER_ID: HeaderName = HeaderName::from_static("x-pdlink-transfer-id");
/// Which version of the weights made the answer: the one that it began with.
pub const X_PDLINK_WEIGHT_VERSION: HeaderName = HeaderName::from_static("x-pdlink-weight-version");
/// Whether both legs went out at once: `sequential` or `concurrent`. Put on the client's response by the proxy.
pub const X_PDLINK_DISPATCH: HeaderName = HeaderName::from_static("x-pdlink-dispatch");
/// Requests of one session keep their worker.
pub const X_SESSION_ID: HeaderName = HeaderName::from_static("x-session-id");

/// Longest `X-Request-Id` that is echoed, in bytes. Longer ones are dropped and replaced by one of our own.
pub const REQUEST_ID_BYTES_MAX: usize = 256;
