//! From a request's bytes to typed fields, with an error that names the field at fault.

use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use bytes::Bytes;
use http::StatusCode;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::openai::ApiError;

/// Largest body, in bytes: the proxy's own default.
pub(super) const BODY_BYTES_MAX: usize = 64 << 20;
/// How long a client may take to send its body.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);

/// Reads the whole body as a JSON object.
pub(super) async fn read_object(request: Request) -> Result<Value, ApiError> {
    let bytes = read(request.into_body()).await?;
    let value: Value = serde_json::from_slice(&bytes)
        .map_err(|error| ApiError::bad_request(format!("the body is not JSON: {error}")))?;
    if value.is_object() { Ok(value) } else { Err(ApiError::bad_request("the body must be a JSON object")) }
}

/// As [`read_object`]; no body at all is an empty object.
pub(super) async fn read_object_or_nothing(request: Request) -> Result<Value, ApiError> {
    let bytes = read(request.into_body()).await?;
    if bytes.is_empty() {
        return Ok(Value::Object(serde_json::Map::new()));
    }
    read_object(Request::new(Body::from(bytes))).await
}

async fn read(body: Body) -> Result<Bytes, ApiError> {
    let limited = Limited::new(body, BODY_BYTES_MAX);
    match tokio::time::timeout(BODY_TIMEOUT, limited.collect()).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            let message = format!("the body is larger than {BODY_BYTES_MAX} bytes");
            Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message))
        }
        Ok(Err(error)) => Err(ApiError::bad_request(format!("the body could not be read: {error}"))),
        Err(_) => {
            let message = format!("the body did not come within {} s", BODY_TIMEOUT.as_secs());
            Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, message))
        }
    }
}

/// Reads typed fields out of an object; unknown ones are ignored, as vLLM does.
pub(super) fn fields<T: DeserializeOwned>(object: &Value) -> Result<T, ApiError> {
    serde_path_to_error::deserialize(object).map_err(|error| {
        let path = error.path().to_string();
        let message = error.into_inner().to_string();
        if path == "." {
            // A missing field has no path of its own.
            let name = message.strip_prefix("missing field `").and_then(|rest| rest.split('`').next());
            return ApiError { param: name.map(str::to_owned), ..ApiError::bad_request(message) };
        }
        let param: String = path.split(['.', '[']).next().unwrap_or_default().to_owned();
        ApiError::bad_param(param, format!("{path}: {message}"))
    })
}
